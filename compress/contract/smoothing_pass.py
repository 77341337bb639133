"""Smoothing pass: rescales activations and keeps the function of the model.

It works activation by activation, from statistics of each; its executor is executors/smooth.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.architecture.families import Layout, Space, layout
from compress.contract.pass_base import Executor
from compress.contract.shapes import ObservingPass
from compress.errors import Refusal
from compress.spec.selectors import matches
from compress.spec.weight_state import MATRICES, State, Weight

if TYPE_CHECKING:
    import torch


class Matrix(NamedTuple):
    """One matrix that reads a space: a weight, or one expert of a fused one. `value` [out, in] in fp32."""

    weight: Weight
    value: torch.Tensor


class SmoothingPass(ObservingPass):
    """Divides the channels of spaces by numbers where they are written, and multiplies by them where they are read."""

    def executor(self) -> Executor:
        return "smooth"

    def layout(self, weights: Sequence[Weight], family: str, config: dict[str, Any]) -> Layout:
        """The spaces that targeted weights read. Raises InputError for a family (model_type) that is not known."""
        wanted = frozenset(weight.name for weight in self.chosen(weights) if weight.kind in MATRICES)
        return layout(weights, family, config, wanted)

    def targeted(self, weight: Weight) -> bool:
        """Whether the smoothing is for this weight's sake; other weights of a space are only rescaled along."""
        named, spared = (any(matches(selector, weight) for selector in which) for which in (self.targets, self.skip))
        return named and not spared

    def becomes(self, weight: Weight, state: State) -> State:
        if state.scheme is not None:
            raise Refusal(f"it is already {state}, whose columns no number can be given", "smooth before quantizing")
        return state

    @abstractmethod
    def balance(self, space: Space, matrices: Iterable[Matrix], prepared: Any) -> torch.Tensor | None:
        """The positive numbers [space.width]; None leaves a space unchanged. `matrices` can be iterated once."""
