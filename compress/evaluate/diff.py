"""Diff: how far the weights of two checkpoints are apart, in any state.

A weight's error is |A - B| / |A| in the Frobenius norm, with codes dequantized. One weight of each side is in memory at a time,
and sums are in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import InputError
from compress.layerwise.dense_view import DenseView
from compress.layerwise.logits import label_of

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One weight that both have."""

    name: str
    shape: tuple[int, ...]
    states: tuple[str, str]
    lost: float
    """|A - B| squared."""
    norm: float
    """|A| squared."""

    @property
    def error(self) -> float:
        return ratio(self.lost, self.norm)


@dataclass(frozen=True)
class Difference:
    """What `difference` found."""

    rows: tuple[Row, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Weights that only A has, and only B."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Weights of different shapes, which are not compared."""

    @property
    def error(self) -> float:
        """The error over all compared weights together; NaN if there are none."""
        return math.nan if not self.rows else ratio(sum(row.lost for row in self.rows), sum(row.norm for row in self.rows))

    @property
    def equal(self) -> int:
        """Weights without any difference."""
        return sum(row.lost == 0 for row in self.rows)


def ratio(lost: float, norm: float) -> float:
    """The square root of a ratio of squares; 0 if both are 0."""
    if norm == 0:
        return math.inf if lost > 0 else lost
    return math.sqrt(lost / norm)


def difference(
    a: Checkpoint, b: Checkpoint, progress: Callable[[float], None] = lambda share: None, device: torch.device | str = "cpu"
) -> Difference:
    """Compares every weight of two checkpoints, by name. Raises InputError for one that another tool has quantized."""
    sides = (DenseView(a), DenseView(b))
    logical = (sides[0].logical, sides[1].logical)
    shared = [name for name in logical[0] if name in logical[1]]
    if not shared:
        raise InputError(label_of(b), f"weights that {label_of(a)} has", "none of them", "compare checkpoints of one model")
    only = tuple(tuple(name for name in own if name not in other) for own, other in (logical, logical[::-1]))
    rows, shapes = [], {}
    for number, name in enumerate(shared):
        pair = (logical[0][name].shape, logical[1][name].shape)
        if pair[0] != pair[1]:
            shapes[name] = pair
            continue
        lost, norm = _squares(*(side.dense(name).to(device) for side in sides))
        rows.append(Row(name, pair[0], (_state(a, name), _state(b, name)), lost, norm))
        progress((number + 1) / len(shared))
    return Difference(tuple(rows), (only[0], only[1]), shapes)


def _squares(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(|a - b| squared, |a| squared)."""
    lost = norm = 0.0
    for left, right in zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True):
        left = left.double()
        norm += float(left.square().sum())
        lost += float((left - right.double()).square().sum())
    return lost, norm


def _state(checkpoint: Checkpoint, name: str) -> str:
    """A weight's state by the manifest, which packing keeps."""
    records = checkpoint.manifest.weights if checkpoint.manifest else {}
    return records[name].state if name in records else "dense"
