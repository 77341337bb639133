"""Rotate: multiplies gains and rotations into each tensor, piece by piece.

A tensor is read once, computed in float64, rounded once to its dtype, and written and journaled by itself, so that a crash costs
one tensor. What needs no rotation is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.architecture.rotations import R1, Axis, Turn
from compress.checkpoint.reader import torch_dtype
from compress.contract.rotating_pass import PIECE_BYTES
from compress.errors import InputError
from compress.executors.step_run import StepRun
from compress.executors.stream import stream, write_each
from compress.numerics.rotation import Rotation, rotation
from compress.spec.weight_state import Weight


def rotate(run: StepRun) -> dict[str, float]:
    """Writes every weight that is not journaled yet."""
    stream(run.untouched())
    writer, turning = run.writer, Turning(run)

    def one(weight: Weight) -> None:
        value = turning.value(turning.all.turns[weight.name])
        writer.record(weight.name, {weight.name: writer.put(weight.name, value)}, {})

    write_each(run, run.touched, one)
    return {}


class Turning:
    """Makes the rotated tensors of a checkpoint."""

    def __init__(self, run: StepRun) -> None:
        assert run.step.rotations is not None
        self.source, self.seed, self.all = run.source, run.ctx.seed, run.step.rotations
        # Made before any worker needs it: it is the large one.
        self.r1 = self._made(R1, self.all.hidden) if any(turn.has_r1 for turn in self.all.turns.values()) else None

    def value(self, turn: Turn) -> torch.Tensor:
        """A tensor as it is written. Raises InputError for numbers that its dtype cannot hold."""
        weight, plus = turn.weight, self.all.plus
        if turn.constant:
            return torch.full(weight.shape, 1 - plus, dtype=torch_dtype(weight.dtype))
        value = self.source.read(turn.source)
        gain = self.source.read(turn.norm.name).double() + plus if turn.norm is not None else None
        out = torch.empty_like(value)
        self._into(out, value, turn.axes, gain)
        if not bool(torch.isfinite(out).all()):
            do = "start from a checkpoint in bfloat16"
            raise InputError(f"'{weight.name}', rotated", f"numbers that {weight.dtype} can hold", "an overflow", do)
        return out

    def _into(self, out: torch.Tensor, value: torch.Tensor, axes: Sequence[Axis], gain: torch.Tensor | None) -> None:
        """Writes a tensor of one to three dimensions, rotated, into `out`."""
        if value.dim() == 3:
            for one, into in zip(value, out, strict=True):
                self._into(into, one, [axis._replace(place=axis.place - 1) for axis in axes], gain)
            return
        if value.dim() == 1:
            self._into(out[None], value[None], [axis._replace(place=1) for axis in axes], gain)
            return
        # R1 needs a whole row, or column, in a piece; R2 beside it only whole heads.
        axes = sorted(axes, key=lambda axis: axis.key != R1)
        cut, head = 1 - axes[0].place, self.all.head
        most = max(1, PIECE_BYTES // (8 * value.shape[1 - cut]) // head) * head
        for at in range(0, value.shape[cut], most):
            size = min(most, value.shape[cut] - at)
            x = value.narrow(cut, at, size).double()
            for axis in axes:
                if gain is not None and axis.key == R1:
                    x *= gain[:, None] if axis.place == 0 else gain
                begin, end = (at, at + size) if axis.place == cut else (0, value.shape[axis.place])
                first, last = max(axis.first, begin) - begin, min(axis.first + axis.size, end) - begin
                if first < last:
                    part = x.narrow(axis.place, first, last - first)
                    part.copy_(self._rotation(axis).rotate(part, axis.place))
            out.narrow(cut, at, size).copy_(x)

    def _rotation(self, axis: Axis) -> Rotation:
        if axis.key != R1:
            return self._made(axis.key, self.all.head)
        assert self.r1 is not None
        return self.r1

    def _made(self, key: str, n: int) -> Rotation:
        return rotation(n, self.all.kind, f"{self.seed}/rotate/{key}")
