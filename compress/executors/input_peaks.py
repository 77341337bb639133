"""Input peaks: what a sweep measures for weights whose inputs will be rounded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from compress.context import Context
from compress.contract.tasks import Solution
from compress.executors.across import largest
from compress.numerics.input_rotation import rotated
from compress.numerics.inputs import input_divisor
from compress.numerics.qtensor import QTensor
from compress.spec.weight_state import State


class InputPeaks:
    """The largest magnitude among the inputs of weights that read one tensor, if what divides their scales follows from it."""

    def __init__(self, states: Iterable[State], device: torch.device) -> None:
        schemes = [state.scheme for state in states if state.scheme is not None and state.scheme.input_divisor]
        measured = bool(schemes)
        self._hadamard = schemes[0].hadamard if schemes else 0
        self.peak = torch.zeros((), device=device) if measured else None
        """fp32 []; None where it is not needed."""

    def see(self, rows: torch.Tensor) -> None:
        """Adds inputs [tokens, width]."""
        if self.peak is not None and len(rows):
            self.peak = torch.maximum(self.peak, rotated(rows, self._hadamard).abs().amax().float())

    def add_up(self, ctx: Context) -> None:
        """Takes the largest of all processes."""
        if self.peak is not None:
            largest(ctx, [self.peak])

    def put(self, solution: Solution) -> Solution:
        """A solution with the number that its inputs share, if its scheme has one."""
        q = solution.value
        if self.peak is None or not isinstance(q, QTensor) or not q.scheme.input_divisor:
            return solution
        return replace(solution, value=replace(q, input_scale=input_divisor(float(self.peak), self.peak.device)))
