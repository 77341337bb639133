"""Zeroes the smallest weights: a share of each matrix, or n:m along the inputs.

The baseline that every pruning method is measured against; data-free. Entries that stay keep their bits. Zeroed
weights stay zero through later passes, which is checked after each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.contract import TargetedPass
from compress.errors import Refusal
from compress.facts import FLOATS, MATRICES, State, Weight
from compress.sparsity import Sparsity

if TYPE_CHECKING:
    import torch

    from compress.qtensor import QTensor


class Magnitude(TargetedPass):
    """Keeps the entries of largest magnitude."""

    sparsity: Sparsity = Field(description="share of zeros, e.g. 0.5, or how many of each m inputs are kept, e.g. 2:4")
    scope: Literal["matrix", "row"] = Field("matrix", description="what a share is taken of: the matrix, or each output's row")

    def becomes(self, weight: Weight, state: State) -> State:
        if weight.kind not in MATRICES:
            raise Refusal(f"a {weight.kind} tensor is not a matrix of weights", "leave it out of targets")
        if weight.unclear:
            raise Refusal(weight.unclear, "skip it by name")
        if state != State():
            raise Refusal(f"it is already {state}", "prune first, and once")
        if weight.dtype not in FLOATS or len(weight.shape) not in (2, 3) or not weight.numel:
            raise Refusal(f"{weight.dtype} {list(weight.shape)} cannot be pruned", "skip it by name")
        if self.sparsity.of is not None and weight.in_features % self.sparsity.of:
            raise Refusal(f"{self.sparsity.of} does not divide {weight.in_features} inputs", "skip it, or use a share of zeros")
        return State(None, self.sparsity)

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        from compress.algebra.masks import keep_best
        from compress.qtensor import QTensor, along_inputs

        assert not isinstance(value, QTensor)
        scores = along_inputs(weight, value).float().abs_()
        keep = keep_best(scores, self.sparsity, per_row=self.scope == "row")
        norm = float(scores.norm())
        lost = float(scores.masked_fill_(keep, 0).norm())
        return value.masked_fill(along_inputs(weight, ~keep), 0), lost / norm if norm else 0.0

    def workspace_bytes(self, weight: Weight) -> int:
        return 9 * weight.numel  # scores in fp32, their bits compared, two masks, the result
