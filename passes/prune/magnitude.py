"""Zeroes the smallest weights: a share of each matrix, or n:m along the inputs.

The baseline that every pruning method is measured against; data-free, unless `owl` chooses the share of each block. Kept entries
do not change: a refit would need what prune.wanda observes, and there it is. Zeroed weights stay zero through later passes,
which is checked after each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.contract.base_passes import PruningPass
from compress.contract.shapes import TensorPass
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Magnitude(PruningPass, TensorPass):
    """Keeps the entries of largest magnitude."""

    example: ClassVar[str] = "prune.magnitude(sparsity=2:4)"

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        from compress.numerics.masks import keep_best, zeroed
        from compress.numerics.qtensor import QTensor, along_inputs

        assert not isinstance(value, QTensor)
        assert after.sparsity is not None
        scores = along_inputs(weight, value).float().abs_()
        keep = keep_best(scores, after.sparsity, per_row=self.scope == "row")
        norm = float(scores.norm())
        lost = float(scores.masked_fill_(keep, 0).norm())
        return zeroed(value, along_inputs(weight, keep)), lost / norm if norm else 0.0

    def workspace_bytes(self, weight: Weight) -> int:
        return 9 * weight.numel  # scores in fp32, their bits compared, two masks, the result
