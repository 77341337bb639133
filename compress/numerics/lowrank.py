"""Low rank: the best low-rank factors of a matrix, and their stored form.

Legend: E [m, n]; E = U S V^T its singular value decomposition, s_1 >= s_2 >= ...; r the rank; L = U_r S_r^(1/2) [m, r] and
R = S_r^(1/2) V_r^T [r, n], so that |E - L R|^2 = sum_(i>r) s_i^2, the minimum; how S is divided between them is arbitrary.
H = C C^T [n, n] is the mean outer product of inputs x: |(E - L R) x|^2 is |(E - L R) C|^2, so the best factors for outputs
are those of E C, with R multiplied by C^-1 (LQER, 2402.02446).

Large matrices are not decomposed: subspace iteration multiplies E and E^T in turn by a thin matrix Q [n, r + 8] (Halko et
al., 0909.4061) until a round increases the captured energy by at most a share of 2^-12.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.spec.corrections import Lowrank

_EXACT = 512
"""Matrices with a side up to this are decomposed directly."""
_MORE, _ROUNDS, _TOLERANCE = 8, 64, 2.0**-12


@dataclass(frozen=True)
class Factors:
    """left [experts?, rows, r] and right [experts?, r, columns], floats, or int8 with a scale [experts?, r] fp32."""

    left: torch.Tensor
    right: torch.Tensor
    scale: torch.Tensor | None = None

    def product(self) -> torch.Tensor:
        """fp32 [experts?, rows, columns]."""
        return self.halves()[0] @ self.halves()[1]

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors in fp32, each multiplied by the square root of the scale."""
        left, right = self.left.float(), self.right.float()
        if self.scale is None:
            return left, right
        root = self.scale.sqrt()
        return left * root[..., None, :], right * root[..., None]

    def turned(self) -> Factors:
        """The factors of the transpose."""
        return Factors(self.right.mT.contiguous(), self.left.mT.contiguous(), self.scale)


def best(e: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L [m, r] and R [r, n] of the matrix `e` [m, n], in fp32 at least."""
    e = e if e.dtype == torch.float64 else e.float()
    if min(e.shape) <= _EXACT or 4 * rank >= min(e.shape):
        u, s, v = torch.linalg.svd(e, full_matrices=False)
    else:
        u, s, v = _thin(e, rank)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _thin(e: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values and their vectors, from a fixed start, so that results are reproducible."""
    q = torch.randn(e.shape[1], rank + _MORE, generator=torch.Generator().manual_seed(0), dtype=e.dtype).to(e.device)
    caught = 0.0
    for _ in range(_ROUNDS):
        p = torch.linalg.qr(e @ q).Q
        q, r = torch.linalg.qr(e.T @ p)
        now = float(torch.linalg.svdvals(r)[:rank].square().sum())
        if now - caught <= _TOLERANCE * now:
            break
        caught = now
    # e is approximately p r^T q^T.
    u, s, v = torch.linalg.svd(r.T)
    return p @ u, s, v @ q.T


def best_for(e: torch.Tensor, rank: int, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R that minimise |(e - L R) c|, for an invertible upper triangular `c` [n, n]."""
    left, right = best(e @ c, rank)
    return left, torch.linalg.solve_triangular(c, right, upper=True, left=False)


def stored(left: torch.Tensor, right: torch.Tensor, lowrank: Lowrank) -> Factors:
    """Factors in their stored form, filled up with zeros to the rank."""
    short = lowrank.rank - left.shape[-1]
    left, right = torch.nn.functional.pad(left, (0, short)), torch.nn.functional.pad(right, (0, 0, 0, short))
    if not lowrank.int8:
        return Factors(left.bfloat16(), right.bfloat16())
    (left, s), (right, t) = _int8(left, 0), _int8(right, 1)
    return Factors(left, right, (s.squeeze(0) * t.squeeze(1)).float())


def _int8(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scale of each rank; the scale is 1 for a rank of zeros."""
    most = x.abs().amax(dim, keepdim=True) / 127
    scale = torch.where(most == 0, 1, most)
    return (x / scale).round().to(torch.int8), scale
