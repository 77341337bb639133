"""Round to nearest: integer codes without data, one weight at a time.

Scale from the largest magnitude of each group (`clip=none`) or from a search for the least squared error
(`clip=mse`); all rounding in fp32, scales on the grid of the dtype they are stored in. Derivation and
conventions: compress/algebra/grid.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.contract import TensorPass
from compress.facts import State, Weight
from compress.kinds import QuantizingPass

if TYPE_CHECKING:
    import torch

    from compress.qtensor import QTensor


class Rtn(QuantizingPass, TensorPass):
    """Rounds weights to the nearest code."""

    clip: Literal["none", "mse"] = Field(
        "none", description="range of a group: its largest magnitude, or a search for least squared error"
    )

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        from compress.algebra.grid import round_to_nearest
        from compress.qtensor import QTensor

        assert after.scheme is not None
        assert not isinstance(value, QTensor)
        flat = value.reshape(-1, weight.columns)
        result = round_to_nearest(flat, after.scheme, value.dtype, self.clip, self.least_zero)
        lead = value.shape[:-1]
        shaped = [None if t is None else t.reshape(*lead, -1) for t in (result.codes, result.scale, result.zero)]
        assert shaped[0] is not None
        assert shaped[1] is not None
        error = (result.squared_error / result.squared_norm) ** 0.5 if result.squared_norm else 0.0
        return QTensor(after.scheme, shaped[0], shaped[1], shaped[2]), error
