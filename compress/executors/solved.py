"""Solved: matrices solved at once, and what their solutions make of a weight."""

from __future__ import annotations

from typing import Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.contract.tasks import Solution
from compress.numerics import qtensor
from compress.numerics.rounding import stacked
from compress.spec.weight_state import State, Weight

_STACKED_ROWS = 4096

Part = tuple[Weight, int | None]
"""One matrix: its weight, and the number of the expert if the weight holds all experts."""


def stacks_of(parts: list[Part]) -> list[list[Part]]:
    """Groups small matrices with the same inputs, to solve them at once: many rows cost little more than few."""
    stacks: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (part[1] or 0, part[0].name)):
        last = stacks[-1] if stacks and stacks[-1][0][1] == part[1] else []
        if last and sum(weight.out_features for weight, _ in last) + part[0].out_features <= _STACKED_ROWS:
            last.append(part)
        else:
            stacks.append([part])
    return stacks


def joined(weight: Weight, values: list[Any]) -> Any:
    """The value of a weight [experts?, rows, columns] from those of its matrices."""
    if not isinstance(values[0], qtensor.QTensor):
        return qtensor.along_inputs(weight, values[0]) if weight.experts is None else torch.stack(values)
    if weight.experts is None:
        return values[0]
    return stacked(values)


def dense_of(weight: Weight, after: State, value: Any) -> torch.Tensor:
    """A new value, dequantized, in the stored shape and dtype."""
    if isinstance(value, qtensor.QTensor):
        value = value.dequantize().to(torch_dtype(weight.dtype))
    return qtensor.as_matrix(weight, value)


def facts_of(solutions: list[Solution]) -> dict[str, float]:
    """A weight's facts for the journal: relative errors over all of its matrices."""
    sums = {
        "error": (sum(s.lost for s in solutions), sum(s.norm for s in solutions)),
        "output_error": (sum(s.output_lost for s in solutions), sum(s.output_norm for s in solutions)),
    }
    return {name: (max(lost, 0.0) / norm) ** 0.5 if norm else 0.0 for name, (lost, norm) in sums.items()}
