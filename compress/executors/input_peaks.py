"""Input peaks: what a sweep measures for weights whose inputs will be rounded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from compress.context import Context
from compress.contract.tasks import Solution
from compress.executors.across import largest
from compress.numerics.inputs import input_divisor
from compress.numerics.qtensor import QTensor
from compress.spec.weight_state import State


class InputPeaks:
    """The largest magnitude among the inputs of weights that read one tensor, if what divides their scales follows from it."""

    def __init__(self, states: Iterable[State], device: torch.device) -> None:
        measured = any(state.scheme is not None and state.scheme.input_divisor for state in states)
        self.peak = torch.zeros((), device=device) if measured else None
        """fp32 []; None where it is not needed."""

    def see(self, rows: torch.Tensor) -> None:
        """Adds inputs [tokens, width]."""
        if self.peak is not None and len(rows):
            self.peak = torch.maximum(self.peak, rows.abs().amax().float())

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
