"""Takes codes out of a packed artifact, ours or another tool's.

A recipe can then go on from it.

Codes are kept where a scheme of ours has their numbers: unpacking and packing for another reader then changes no weight.
Other numbers become the dense weights that they mean, and so does everything with `to=dense`.
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
    """Reads what a packed artifact means; the first pass of a recipe, or none."""

    unpacks: ClassVar[bool] = True

    to: Literal["codes", "dense"] = Field("codes", description="keep codes where a scheme here has them, or expand all weights")

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
