"""Hessian: the Gram matrix of a layer's inputs, and its factor.

Legend: x [tokens, n] inputs; H = mean of x x^T [n, n]; lambda the damping; R upper triangular with positive diagonal,
R R^T = H + lambda I in the order in which columns are rounded; F = R diag(R)^-1 with ones on its diagonal.

GPTQ is usually written with U, the upper Cholesky factor of the inverse. U = R^-1, so U_ii = 1 / R_ii, and carrying
the error of column i forward, W -= e_i U_i / U_ii, ends at the same targets as reading the errors of all earlier columns
when column k's turn comes: w_k + sum_(j<k) (w_j - q_j) F_jk (Chee et al., QuIP, theorem 6). That needs no inverse: one
Cholesky factorization of H with rows and columns reversed, a third of the work and better conditioned.

The scale of H does not matter to anything that is computed from it: lambda is a fraction of H's mean diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from compress.numerics.products import in_bfloat16

Order = Literal["none", "activation"]
"""Order of rounding: as stored, or the inputs of the largest mean square first."""

_TILE = 512
"""Rows of H updated at once: H is symmetric, and only tiles up to the diagonal are computed."""
_GROWTH = 4.0
"""What the damping is multiplied by after a factorization that failed."""


class Hessian:
    """Accumulates x x^T; both `matrix` and `tokens` are sums, so processes can add theirs up.

    Products are in fp32, their sums in fp64: fp32 numbers that are not of wildly different size add up without rounding
    there, so that the order of batches, and which process had them, changes no bit.
    Only the lower triangle of `matrix` [width, width] is meaningful; `mean` fills the other.
    """

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64)
        self.dtype = dtype
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Folds in inputs [tokens, width] of any float dtype."""
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
        """H [width, width], symmetric. The sum is consumed: the H that is returned takes its place."""
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


@dataclass(frozen=True)
class Factor:
    """What rounding in turn needs of H + lambda I; the first three are in the order of rounding."""

    feedback: torch.Tensor
    """F [n, n], upper triangular with ones on the diagonal."""
    pivots: torch.Tensor
    """R_kk^2 [n], the 1 / U_kk^2 of GPTQ: what an error of one in column k's turn adds to the loss."""
    order: torch.Tensor | None
    """Which column is k-th, int64 [n]; None where they are taken as stored."""
    dead: torch.Tensor
    """Columns whose input was always zero, bool [n], as stored: their weights cannot matter and become zero."""
    damping: float
    """lambda as a fraction of H's mean diagonal: what was asked for, or more where that did not suffice."""
    ridge: float
    """lambda itself."""


def factor(h: torch.Tensor, damp: float = 0.01, order: Order = "none") -> Factor:
    """Factors H [n, n]; raises the damping until that works. Raises ValueError for an H that is no Gram matrix.

    An H of zeros, the layer that saw no input, is taken for the identity: nothing is known, and nothing is dead.
    """
    low, high = (float(bound) for bound in h.aminmax())  # NaN wins both
    diagonal = h.diagonal()
    if not (-float("inf") < low <= high < float("inf")) or float(diagonal.min()) < 0:
        raise ValueError("the Hessian has entries that are not finite, or a negative diagonal: an input was not finite")
    scale = float(diagonal.mean(dtype=torch.float64))
    dead = diagonal == 0
    if scale == 0:
        n = len(h)
        ones = torch.ones(n, dtype=h.dtype, device=h.device)
        return Factor(torch.eye(n, dtype=h.dtype, device=h.device), ones, None, torch.zeros_like(dead), damp, 0.0)
    permutation = diagonal.argsort(descending=True, stable=True) if order == "activation" else None
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
