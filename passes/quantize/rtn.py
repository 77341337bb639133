"""Round to nearest: integer codes without data, one weight at a time.

Scale from the largest magnitude of each group (`clip=none`) or from a search for the least squared error
(`clip=mse`); all rounding in fp32, scales on the grid of the dtype they are stored in. Derivation and
conventions: compress/algebra/grid.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.contract import TargetedPass
from compress.errors import Refusal
from compress.facts import FLOATS, MATRICES, Note, State, Weight
from compress.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from compress.qtensor import QTensor

_SMALLEST_GROUP = 16


class Rtn(TargetedPass):
    """Rounds weights to the nearest code."""

    scheme: Scheme = Field(description="what the codes mean, e.g. w4a16g128, w3a16g64-asym, w8a16")
    clip: Literal["none", "mse"] = Field(
        "none", description="range of a group: its largest magnitude, or a search for least squared error"
    )
    ragged: Literal["refuse", "divide", "channel"] = Field(
        "refuse",
        description="columns that the group does not divide: refuse, or take the largest group that does, or one scale per row",
    )

    def becomes(self, weight: Weight, state: State) -> State:
        if weight.kind not in MATRICES:
            raise Refusal(f"a {weight.kind} tensor is not a matrix of weights", "leave it out of targets")
        if weight.unclear:
            raise Refusal(weight.unclear, "skip it by name")
        if state.scheme is not None:
            raise Refusal(f"it is already {state}; quantizing twice would round rounded values", "skip it in one of the passes")
        if weight.dtype not in FLOATS or len(weight.shape) not in (2, 3) or not weight.numel:
            raise Refusal(f"{weight.dtype} {list(weight.shape)} cannot be rounded", "skip it by name")
        return State(self._fitting(weight), state.sparsity)

    def _fitting(self, weight: Weight) -> Scheme:
        """The scheme with a group that divides this weight's columns."""
        group, columns = self.scheme.group, weight.columns
        if group is None or columns % group == 0:
            return self.scheme
        if self.ragged == "channel":
            return replace(self.scheme, group=None)
        divisors = [g for g in range(_SMALLEST_GROUP, min(group, columns + 1)) if columns % g == 0]
        if self.ragged == "divide" and divisors:
            return replace(self.scheme, group=divisors[-1])
        near = f"ragged=divide (groups of {divisors[-1]}), " if divisors else ""
        raise Refusal(f"groups of {group} do not divide {columns} columns", f"{near}ragged=channel, or another group")

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        from compress.algebra.grid import round_to_nearest
        from compress.qtensor import QTensor

        assert after.scheme is not None
        assert not isinstance(value, QTensor)
        flat = value.reshape(-1, weight.columns)
        result = round_to_nearest(flat, after.scheme, value.dtype, self.clip)
        lead = value.shape[:-1]
        shaped = [None if t is None else t.reshape(*lead, -1) for t in (result.codes, result.scale, result.zero)]
        assert shaped[0] is not None
        assert shaped[1] is not None
        error = (result.squared_error / result.squared_norm) ** 0.5 if result.squared_norm else 0.0
        return QTensor(after.scheme, shaped[0], shaped[1], shaped[2]), error

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        changed: dict[str, list[str]] = defaultdict(list)
        for weight in weights:
            scheme = states[weight.name].scheme
            if scheme is not None and scheme != self.scheme:
                changed[f"{weight.columns} columns, {self.scheme} became {scheme}"].append(weight.name)
        return [Note("ragged", reason, tuple(names)) for reason, names in changed.items()]
