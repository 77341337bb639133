"""Hessian: the Gram matrix of a layer's inputs, and its factor.

Legend: x [tokens, n] inputs; H = mean of x x^T [n, n]; lambda the damping; R upper triangular with positive diagonal,
R R^T = H + lambda I in the order in which columns are rounded; F = R diag(R)^-1 with ones on its diagonal.

GPTQ is usually written with U, the upper Cholesky factor of the inverse. U = R^-1, so U_ii = 1 / R_ii, and propagating
the error of column i forward, W -= e_i U_i / U_ii, gives the same targets as adding the errors of all earlier columns
when column k is rounded: w_k + sum_(j<k) (w_j - q_j) F_jk (Chee et al., QuIP, theorem 6). That needs no inverse, only one
Cholesky factorization of H with rows and columns reversed: a third of the work, and better conditioned.

Results do not depend on the scale of H, because lambda is a fraction of H's mean diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from compress.numerics.input_rotation import rotated, rotated_both
from compress.numerics.products import in_bfloat16

Order = Literal["none", "activation"]
"""Order of rounding: as stored, or by descending mean square of the input."""

_TILE = 512
"""Rows of H updated at once; H is symmetric, so only tiles up to the diagonal are computed."""
_GROWTH = 4.0
"""The damping is multiplied by this after a factorization that failed."""


class Hessian:
    """Accumulates x x^T; both `matrix` and `tokens` are sums, so processes can add theirs up.

    Products are in fp32, their sums in fp64, where fp32 numbers of not too different size add up without rounding. So the
    order of batches, and their distribution over processes, changes no bit.
    Only the lower triangle of `matrix` [width, width] is valid; `mean` fills the other.
    """

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64)
        self.dtype = dtype
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs [tokens, width] of any float dtype."""
        with in_bfloat16(x.dtype == torch.bfloat16):
            x = x.to(self.dtype)
            for start in range(0, x.shape[1], _TILE):
                end = min(start + _TILE, x.shape[1])
                self.matrix[start:end, :end] += x[:, start:end].T @ x[:, :end]
        self.tokens += len(x)

    def parts(self) -> list[torch.Tensor]:
        """The sums, to be added up over processes in place."""
        return [self.matrix]

    def mean(self) -> torch.Tensor:
        """H [width, width], symmetric. It overwrites the sum, so it can be computed only once."""
        n = len(self.matrix)
        self.matrix /= max(1, self.tokens)
        self.matrix = self.matrix.to(self.dtype)
        for start in range(0, n, _TILE):
            rows = slice(start, min(start + _TILE, n))
            square = self.matrix[rows, rows]
            square.copy_(square.tril() + square.tril(-1).T)
            self.matrix[rows, rows.stop :] = self.matrix[rows.stop :, rows].T
        self.tokens = min(1, self.tokens)
        return self.matrix


class PairedHessian(Hessian):
    """Also accumulates x u^T of the inputs x of the model as it was, and the inputs u of the one that is changed.

    And r u^T, if it is expected, of what the output is to make up for besides, r [tokens, rows].
    """

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(width, dtype)
        self.residual: torch.Tensor | None = None
        self.cross = torch.zeros(width, width, dtype=torch.float64)
        self.paired = torch.zeros((), dtype=torch.float64)

    def add_pair(self, u: torch.Tensor, x: torch.Tensor) -> None:
        """Adds inputs [tokens, width] as they are, and as they were."""
        self.add(u)
        with in_bfloat16(u.dtype == torch.bfloat16):
            self.cross += x.to(self.dtype).T @ u.to(self.dtype)
        self.paired += len(u)

    def expect_residual(self, rows: int) -> None:
        self.residual = torch.zeros(rows, len(self.matrix), dtype=torch.float64, device=self.matrix.device)

    def add_residual(self, u: torch.Tensor, r: torch.Tensor) -> None:
        """Adds what is missing in the sum of which the output is a part, [tokens, rows]."""
        assert self.residual is not None
        with in_bfloat16(u.dtype == torch.bfloat16):
            self.residual += r.to(self.dtype).T @ u.to(self.dtype)

    def parts(self) -> list[torch.Tensor]:
        return [*super().parts(), self.cross, self.paired, *([] if self.residual is None else [self.residual])]


@dataclass(frozen=True)
class Factor:
    """The factorization of H + lambda I for rounding columns in turn; the first three are in the order of rounding."""

    feedback: torch.Tensor
    """F [n, n], upper triangular with ones on the diagonal."""
    pivots: torch.Tensor
    """R_kk^2 [n], the 1 / U_kk^2 of GPTQ: the loss that an error of 1 in column k adds."""
    order: torch.Tensor | None
    """Which column is k-th, int64 [n]; None for stored order."""
    dead: torch.Tensor
    """Columns whose input was always zero, bool [n], in stored order: their weights have no effect and become zero."""
    damping: float
    """lambda as a fraction of H's mean diagonal: the one that was asked for, or more if that did not suffice."""
    ridge: float
    """lambda itself."""


class Prepared(NamedTuple):
    """The Hessian [n, n] of some inputs, its factor, and a note if weights cannot be solved as asked."""

    hessian: torch.Tensor
    factor: Factor
    note: tuple[str, str] | None
    correction: torch.Tensor | None = None
    """M [n, n]: the outputs of W M for the changed inputs are closest to those of W for the inputs as they were."""
    addition: torch.Tensor | None = None
    """A [rows, n]: the outputs of A for the changed inputs are closest to what is missing besides."""

    def target(self, w: torch.Tensor) -> torch.Tensor:
        """The weight whose outputs for the inputs as they now are come closest to those that are meant, for W [rows, n]."""
        moved = w if self.correction is None else w @ self.correction
        return moved if self.addition is None else moved + self.addition


def prepare(
    statistic: Hessian, damp: float, order: Order, least: int, instead: str, together: int = 1, hadamard: int = 0
) -> Prepared:
    """Factors the mean of a statistic; with fewer tokens than `least`, the identity, with which a solver does `instead`.

    Inputs are rotated in blocks of `hadamard`, if it is not 0 (input_rotation.py): what is found is of x R and W R.
    """
    if statistic.tokens < max(1, least):
        alone = torch.eye(len(statistic.matrix), device=statistic.matrix.device)
        few = ("fallback", f"fewer than {least} calibration tokens: {instead}")
        why = few if statistic.tokens else ("unrouted", f"no calibration token: {instead}")
        return Prepared(alone, factor(alone, damp, "none"), why)
    cross: torch.Tensor | None = None
    note: tuple[str, str] | None = None
    if isinstance(statistic, PairedHessian):
        cross = (statistic.cross / statistic.paired).to(statistic.dtype) if statistic.paired else None
        cross = None if cross is None else rotated_both(cross, hadamard)
        note = None if statistic.paired else ("uncorrected", "a routed expert gets other tokens in the unchanged model")
    hessian = rotated_both(statistic.mean(), hadamard)
    found = factor(hessian, damp, order, together)
    if found.damping > damp:
        note = "damping", f"a Hessian that needed more damping than {damp:g}"
    if cross is None:
        return Prepared(hessian, found, note)
    assert isinstance(statistic, PairedHessian)
    residual = None if statistic.residual is None else rotated(statistic.residual / statistic.paired, hadamard)
    return Prepared(hessian, found, note, *corrected(cross, residual, hessian, found.ridge))


def corrected(
    cross: torch.Tensor, residual: torch.Tensor | None, h: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """((C + lambda I) (H + lambda I)^-1 [n, n], the identity if the inputs have not changed; R (H + lambda I)^-1 [rows, n])."""
    eye = torch.eye(len(h), dtype=torch.float64, device=h.device)
    lower = torch.linalg.cholesky(h.double() + ridge * eye)

    def solved(b: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.cholesky_solve(b.T, lower).T
        return found.to(h.dtype)

    return solved(cross.double() + ridge * eye), None if residual is None else solved(residual)


def finite(h: torch.Tensor) -> torch.Tensor:
    """`h` itself. Raises ValueError if it is not a Gram matrix."""
    low, high = (float(bound) for bound in h.aminmax())  # both are NaN if any entry is
    if not (-float("inf") < low <= high < float("inf")) or float(h.diagonal().min()) < 0:
        raise ValueError("the Hessian has entries that are not finite, or a negative diagonal: an input was not finite")
    return h


def factor(h: torch.Tensor, damp: float = 0.01, order: Order = "none", together: int = 1) -> Factor:
    """Factors H [n, n]; increases the damping until that works. Raises ValueError for an H that is not a Gram matrix.

    An H of zeros, of a layer that saw no input, is replaced by the identity, and no column counts as always zero.
    An order by activation keeps each aligned group of `together` columns in one piece, placed by its mean.
    """
    diagonal = finite(h).diagonal()
    scale = float(diagonal.mean(dtype=torch.float64))
    dead = diagonal == 0
    if scale == 0:
        n = len(h)
        ones = torch.ones(n, dtype=h.dtype, device=h.device)
        return Factor(torch.eye(n, dtype=h.dtype, device=h.device), ones, None, torch.zeros_like(dead), damp, 0.0)
    permutation = None
    if order == "activation":
        groups = diagonal.reshape(-1, together).mean(1).argsort(descending=True, stable=True)
        permutation = (groups[:, None] * together + torch.arange(together, device=h.device)).flatten()
    # Reversed, because a Cholesky factor is lower triangular and R has to be upper.
    if permutation is None:
        backward, idle = h.flip(0, 1), dead.flip(0)
    else:
        turns = permutation.flip(0)
        backward, idle = h[turns[:, None], turns], dead[turns]
    plain = torch.where(idle, 1, backward.diagonal())
    while True:
        backward.diagonal().copy_(plain + damp * scale)
        lower, failed = torch.linalg.cholesky_ex(backward)
        if not int(failed):
            break
        damp = max(damp * _GROWTH, 1e-5)
    del backward
    feedback = lower.flip(0, 1)
    del lower
    pivots = feedback.diagonal().clone()
    feedback /= pivots
    return Factor(feedback, pivots.square_(), permutation, dead, damp, damp * scale)


def errors(old: torch.Tensor, new: torch.Tensor, h: torch.Tensor) -> tuple[float, float, float, float]:
    """|W - W'|^2, |W|^2, and the same of the outputs per token, for W [rows, n] that becomes W'."""
    before = old.float()
    moved = before - new.float()
    outputs = [float(energies(part.T, h).double().sum()) for part in (moved, before)]
    return float(moved.square().sum()), float(before.square().sum()), outputs[0], outputs[1]


def energies(v: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """v^T H v of each column v of V [n, rows]. H is symmetric: tiles below the diagonal are counted twice instead."""
    total = torch.zeros(v.shape[1], dtype=v.dtype, device=v.device)
    for start in range(0, len(h), _TILE):
        ks = slice(start, min(len(h), start + _TILE))
        product = (h[ks, :start] @ v[:start]).mul_(2).addmm_(h[ks, ks], v[ks])
        total += product.mul_(v[ks]).sum(0)
    return total
