"""Reads the codes of a packed artifact, ours or another tool's.

A recipe can then go on from it.

Codes are kept if one of our schemes has their values: unpacking and packing for another reader then changes no weight.
Others become dense weights, and so does everything with `to=dense`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.contract.shapes import TensorPass
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Unpack(TensorPass):
    """Unpacks a packed artifact; it must be the first pass of a recipe."""

    unpacks: ClassVar[bool] = True

    to: Literal["codes", "dense"] = Field("codes", description="keep codes if one of our schemes has them, or expand all weights")

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        return list(weights)

    def becomes(self, weight: Weight, state: State) -> State:
        return State(None, state.sparsity) if self.to == "dense" else state

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        from compress.checkpoint.reader import torch_dtype
        from compress.numerics.qtensor import QTensor

        if after.scheme is None and isinstance(value, QTensor):
            return value.dequantize().to(torch_dtype(weight.dtype)), None
        return value, None
