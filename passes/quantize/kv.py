"""KV: scales with which readers keep keys and values in FP8.

A cache then takes half the memory of one in 16 bits. A scale is the largest magnitude of keys, after their rotary positions, or
of values, over the calibration tokens, divided by 448, the largest number of E4M3. E4M3 has the same relative precision over 15
powers of two, so a smaller scale would gain nothing for small numbers and cut off large ones: there is nothing to search. What is
larger than anything that was calibrated on is cut off there.

The weights stay as they are, and the model is observed without rounded keys and values. Put it last, before pack: scales fit the
weights that they were measured with. `compress eval` and all else that runs the model here round as the reader does, key by key
and value by value; a reader that also rounds queries, or attention's probabilities, differs by that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.architecture.attention import Attention
from compress.contract.cache_pass import CachePass

if TYPE_CHECKING:
    import torch


class Kv(CachePass):
    """Calibrates scales for keys and values in FP8."""

    example: ClassVar[str] = "calibrate | quantize.kv"
    rule: ClassVar[str] = "scale = largest magnitude on the calibration tokens / 448"

    granularity: Literal["tensor", "head"] = Field(
        "tensor", description="one scale for the keys of a layer and one for its values, or one for each head of them"
    )

    def shape(self, attention: Attention) -> tuple[int, ...]:
        return (1,) if self.granularity == "tensor" else (attention.heads, 1, 1)

    def scale(self, peaks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        from compress.numerics.inputs import cache_scale

        return cache_scale(peaks.amax(0, keepdim=True) if self.granularity == "tensor" else peaks.view(-1, 1, 1), dtype)
