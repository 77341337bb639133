"""Kinds: what quantizers share, and what pruners share: options, refusals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from compress.contract import TargetedPass
from compress.errors import Refusal
from compress.facts import FLOATS, MATRICES, Note, State, Weight
from compress.scheme import Scheme
from compress.sparsity import Sparsity

_SMALLEST_GROUP = 16


def refuse_no_matrix(weight: Weight) -> None:
    """Raises Refusal for what is not a matrix of weights that can be worked on."""
    if weight.kind not in MATRICES:
        raise Refusal(f"a {weight.kind} tensor is not a matrix of weights", "leave it out of targets")
    if weight.unclear:
        raise Refusal(weight.unclear, "skip it by name")
    if weight.dtype not in FLOATS or len(weight.shape) not in (2, 3) or not weight.numel:
        raise Refusal(f"{weight.dtype} {list(weight.shape)} is not a matrix of weights", "skip it by name")


class QuantizingPass(TargetedPass):
    """Makes integer codes of dense or masked weights."""

    scheme: Scheme = Field(description="what the codes mean, e.g. w4a16g128, w3a16g64-asym, w8a16")
    ragged: Literal["refuse", "divide", "channel"] = Field(
        "refuse",
        description="columns that the group does not divide: refuse, or take the largest group that does, or one scale per row",
    )

    def becomes(self, weight: Weight, state: State) -> State:
        refuse_no_matrix(weight)
        if state.scheme is not None:
            raise Refusal(f"it is already {state}; quantizing twice would round rounded values", "skip it in one of the passes")
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

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        changed: dict[str, list[str]] = defaultdict(list)
        for weight in weights:
            scheme = states[weight.name].scheme
            if scheme is not None and scheme != self.scheme:
                changed[f"{weight.columns} columns, {self.scheme} became {scheme}"].append(weight.name)
        return [Note("ragged", reason, tuple(names)) for reason, names in changed.items()]


class PruningPass(TargetedPass):
    """Makes zeros in dense weights."""

    sparsity: Sparsity = Field(description="share of zeros, e.g. 0.5, or how many of each m inputs are kept, e.g. 2:4")
    scope: Literal["matrix", "row"] = Field("matrix", description="what a share is taken of: the matrix, or each output's row")

    def becomes(self, weight: Weight, state: State) -> State:
        refuse_no_matrix(weight)
        if state != State():
            raise Refusal(f"it is already {state}", "prune first, and once")
        if self.sparsity.of is not None and weight.in_features % self.sparsity.of:
            raise Refusal(f"{self.sparsity.of} does not divide {weight.in_features} inputs", "skip it, or use a share of zeros")
        return State(None, self.sparsity)
