"""Clips entries of a matrix that lie too many standard deviations from its mean.

A pass of your own: put this file into `passes/`, and it is the pass `clip`, in recipes, in plans and on the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from compress import TensorPass
from compress.contract.pass_base import TargetedPass
from compress.errors import Refusal
from compress.spec.weight_state import MATRICES, State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Clip(TargetedPass, TensorPass):
    """Clips outlying entries."""

    deviations: float = Field(4.0, gt=0, description="standard deviations that an entry may lie from the mean of its matrix")

    def becomes(self, weight: Weight, state: State) -> State:
        if weight.kind not in MATRICES:
            raise Refusal(f"a {weight.kind} tensor is not a matrix of weights", "leave it out of targets")
        if state != State():
            raise Refusal(f"it is {state}, and only dense weights are clipped", "put this pass first")
        return state

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        import torch

        assert isinstance(value, torch.Tensor)
        w = value.float()
        mean, reach = w.mean(), self.deviations * w.std()
        clipped = w.clamp(mean - reach, mean + reach)
        return clipped.to(value.dtype), float((w - clipped).norm() / w.norm())
