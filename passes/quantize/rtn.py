"""Round to nearest: quantizes to any scheme, without data, weight by weight.

Scales come from the largest magnitude of each group (`clip=none`) or from a search for the least squared error
(`clip=mse`; FP8 has nothing to search). All rounding is in fp32, with scales already rounded to their stored dtype.
With granularity=adaptive the group size of each matrix is chosen first (compress/contract/adaptive_group_pass.py).
Derivation and conventions: compress/numerics/grid.py for integers, kquants.py for K-quants, scales.py and floats.py for others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.adaptive_group_pass import AdaptiveGroupPass
from compress.contract.base_passes import Clip
from compress.contract.shapes import TensorPass
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Rtn(AdaptiveGroupPass, TensorPass):
    """Rounds weights to the nearest code."""

    example: ClassVar[str] = "quantize.rtn(scheme=w4a16g32, clip=mse)"
    rotates: ClassVar[bool] = True

    clip: Clip = "none"
    grid: Literal["full", "paper"] = Field(
        "full", description="symmetric integers: all codes, or (paper) as many below zero as above, as in MoQE and FineQuant"
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.grid == "paper" and not (self.scheme.integer and self.scheme.symmetric):
            raise ValueError(f"grid=paper: symmetric integers, not {self.scheme}")
        return self

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        from compress.numerics.qtensor import QTensor
        from compress.numerics.rounding import nearest

        assert after.scheme is not None
        assert not isinstance(value, QTensor)
        least_code = int(self.grid == "paper")
        found = nearest(value, after.scheme, value.dtype, self.clip, self.least_zero, weight.peak, after.outliers, least_code)
        return found.q, found.error
