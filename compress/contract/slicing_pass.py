"""Slicing pass: makes a smaller model of the parts that it keeps.

It says how many parts of each kind stay, from the config alone, so that a plan has exact sizes; and which ones, from what was
observed on calibration tokens. Its executor is executors/slice.py, with axes.py for what each tensor's dimensions count.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

from compress.architecture.axes import Slice, slices
from compress.contract.pass_base import Executor, ExternalInputs, WeightPass
from compress.errors import Refusal
from compress.spec.kept import Kept, Sizes
from compress.spec.weight_state import DTYPE_BYTES, State, Weight

if TYPE_CHECKING:
    import torch

Fact = Literal["influence", "loss", "activations", "experts", "inputs"]
"""What can be observed of a model: see Observed. `inputs` is needed to fit outputs anew."""


@dataclass(frozen=True)
class Structure:
    """The model that is cut."""

    family: str
    weights: tuple[Weight, ...]
    sizes: Sizes

    def slices(self, after: Sizes) -> list[Slice]:
        """The tensors of a model of other sizes. Raises Refusal."""
        kept = Kept.first(after, self.sizes)
        return slices(self.weights, self.family, kept.layers, [block.experts for block in kept.blocks])

    def shapes(self, after: Sizes) -> dict[str, tuple[int, ...]]:
        """The stored shapes of a model of other sizes. Raises Refusal."""
        kept = Kept.first(after, self.sizes)
        return {one.name: one.shape(kept, self.sizes) for one in self.slices(after)}

    def parameters(self, after: Sizes) -> int:
        """How many numbers a model of other sizes has; what is tied counts once."""
        return sum(prod(shape) for shape in self.shapes(after).values())

    def nbytes(self, after: Sizes) -> int:
        """Bytes of the tensors of a model of other sizes."""
        dtypes = {one.name: one.source.dtype for one in self.slices(after)}
        return sum(prod(shape) * DTYPE_BYTES[dtypes[name]] for name, shape in self.shapes(after).items())


@dataclass
class Observed:
    """What was observed of each block; fields that a pass did not ask for are empty."""

    influence: list[float] = field(default_factory=list)
    """1 - mean cosine of a block's input and output over the tokens (ShortGPT, Men et al., 2403.03853)."""
    loss: list[float] = field(default_factory=list)
    """Cross entropy per token of the model without the block; the last entry is that of the whole model."""
    hidden: torch.Tensor | None = None
    """Score of each channel of the residual stream [hidden], over all norms."""
    queries: list[torch.Tensor] = field(default_factory=list)
    """Score of each query head [queries]."""
    units: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Score of each neuron of each feed-forward, by its name in Kept."""
    experts: list[torch.Tensor] = field(default_factory=list)
    """Mean over an expert's tokens of gate times norm of its output [experts] (REAP, Lasby et al., 2510.13999)."""
    routed: list[torch.Tensor] = field(default_factory=list)
    """Tokens that were sent to each expert [experts]."""


class SlicingPass(WeightPass):
    """Cuts layers, channels, heads, neurons or experts out of a dense model."""

    @abstractmethod
    def resized(self, structure: Structure) -> Sizes:
        """The sizes of the smaller model. Raises Refusal for sizes that it cannot have. Reads no bytes."""

    @abstractmethod
    def keep(self, observed: Observed, before: Sizes, after: Sizes) -> Kept:
        """Which parts stay: as many as `after` says."""

    def trained(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that are trained before the model is cut."""
        return []

    def facts(self) -> tuple[Fact, ...]:
        """What has to be observed for that."""
        return ()

    def value(self, one: Slice, value: torch.Tensor, kept: Kept, before: Sizes) -> torch.Tensor:
        """A tensor of the smaller model, from the stored value of the one that it is cut out of."""
        return one.cut(value, kept, before)

    def executor(self) -> Executor:
        return "slice"

    def reads_tokens(self) -> bool:
        return bool(self.facts())

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        return {"tokens": found.tokens, "dtype": found.dtype} if self.facts() else {}

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        # Tensors that the model does not take belong to no part, so they are left behind.
        return [weight for weight in weights if weight.module]

    def becomes(self, weight: Weight, state: State) -> State:
        if state != State():
            raise Refusal(f"it is already {state}, which nothing can be cut out of", "cut first, and prune or quantize then")
        return state

    def how_to_use_less_memory(self) -> str:
        return "calibrate on fewer tokens"
