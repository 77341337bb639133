"""Kept columns: columns of a few inputs, kept in more bits beside codes.

QUIK (Ashkboos et al., 2310.09259): inputs with outliers are not rounded with the others. All codes of their columns mean zero;
what the columns hold instead lies apart. As a model runs, these inputs stay in 16 bits, or are rounded to int8 per token by
themselves, and the others are rounded as the scheme says (numerics/inputs.py).

Choosing and solving. With the kept columns O last in GPTQ's order, the errors of all others, B, flow into them, and they are
not rounded. Legend: H the Hessian with its damping on the diagonal, D = W - Q.
    min over D_O of trace(D H D^T) = trace(D_B S D_B^T),    S = H_BB - H_BO H_OO^-1 H_OB,    at D_O = -D_B H_BO H_OO^-1.
So the columns of B are solved by any solver with S in the place of H: the factor of GPTQ's order has the factor of S as its
upper left block. Then W_O becomes W_O + D_B H_BO H_OO^-1, the best values for the codes, those of later sweeps included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from compress.numerics.hessian import Factor, Hessian, Order, Prepared, factor, prepare


@dataclass(frozen=True)
class KeptColumns:
    """columns int32 [k], ascending; values [rows, k] in the weight's dtype, or int8 with a scale [rows, 1] in that dtype."""

    columns: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """The values, fp32 [rows, k]."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale.float()

    def put(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` [rows, columns] with these columns in it; gradients of all others go through."""
        return matrix.index_copy(-1, self.columns.long(), self.dense().to(matrix.dtype))

    def take(self, rows: torch.Tensor | slice) -> KeptColumns:
        """Some rows."""
        return KeptColumns(self.columns, self.values[rows], None if self.scale is None else self.scale[rows])

    def marks(self, width: int) -> torch.Tensor:
        """Which of `width` columns are kept, bool [width]."""
        found = torch.zeros(width, dtype=torch.bool, device=self.columns.device)
        found[self.columns.long()] = True
        return found


class PeakedHessian(Hessian):
    """Also keeps the largest magnitude of each input, fp32 [width]."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(width, dtype)
        self.peaks = torch.zeros(width)

    def add(self, x: torch.Tensor) -> None:
        super().add(x)
        if len(x):
            self.peaks = torch.maximum(self.peaks, x.abs().amax(0).float())

    def maxima(self) -> list[torch.Tensor]:
        """What is no sum: over processes the largest counts."""
        return [self.peaks]


class Split(NamedTuple):
    """What weights that read the same inputs share: `hessian` [n, n] of all inputs, and the problem of those that are rounded."""

    hessian: torch.Tensor
    kept: torch.Tensor
    """The kept columns, int64 [k], ascending."""
    rest: torch.Tensor
    """S [n, n]; zeros in the rows and columns that are kept."""
    factor: Factor
    """Of S: kept columns count as inputs that are always zero, so that their codes mean zero."""
    carry: torch.Tensor
    """H_BO H_OO^-1 [n, k]; zeros in the rows that are kept."""
    note: tuple[str, str] | None


def split(statistic: PeakedHessian, keep: int, damping: float, order: Order, least: int) -> Split:
    """Chooses the `keep` columns with the largest inputs, and factors the problem that the others leave.

    With fewer tokens than `least` all inputs count as uncorrelated, which makes the solver round to nearest.
    """
    kept = statistic.peaks.argsort(descending=True, stable=True)[:keep].sort().values
    found: Prepared = prepare(statistic, damping, order, least, "rounded to nearest")
    h = found.hessian
    if not keep:
        return Split(h, kept, h, found.factor, h[:, :0], found.note)
    damped = h.double()
    # Inputs that are always zero have no damping, so that they are known as such.
    damped.diagonal().add_(torch.where(found.factor.dead, 0.0, found.factor.ridge))
    across = damped[:, kept]
    inside = across[kept].clone()
    inside.diagonal().add_(torch.where(inside.diagonal() == 0, 1.0, 0.0))
    carry = torch.linalg.solve(inside, across.T).T
    carry[kept] = 0
    rest = damped.addmm_(carry, across.T, alpha=-1)
    rest[kept], rest[:, kept] = 0, 0
    rest = ((rest + rest.T) / 2).to(h.dtype)
    rest.diagonal().clamp_(min=0)
    ordered: Order = "none" if found.factor.order is None else "activation"
    again = factor(rest, 0.0, ordered)
    raised = ("damping", "what kept columns leave of a Hessian needed more damping") if again.damping else None
    return Split(h, kept, rest, again, carry.to(h.dtype), found.note or raised)


def kept_columns(w: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype, int8: bool) -> KeptColumns:
    """The columns [rows, k] of new values as they are stored."""
    index = columns.to(torch.int32)
    if not int8:
        return KeptColumns(index, w.to(dtype))
    scale = w.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1, scale.clamp(min=torch.finfo(dtype).tiny)).to(dtype)
    return KeptColumns(index, (w / scale.float()).round().clamp(-127, 127).to(torch.int8), scale)
