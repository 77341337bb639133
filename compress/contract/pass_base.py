"""Pass base: the methods and fields of every pass, whatever its shape.

A pass module defines exactly one Pass class that is not abstract. Its fields are the recipe keys, the flags and the help text;
its docstring's first line is its line in `compress list`. Modules of passes import torch inside their methods only, so that
help and plans of recipes start fast. The shapes that a pass can have are in shapes.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.errors import UsageError
from compress.spec import selectors
from compress.spec.recipe import Line, Value
from compress.spec.weight_state import Note, State, Weight

if TYPE_CHECKING:
    from compress.architecture.families import Layout
    from compress.checkpoint.reader import Checkpoint
    from compress.contract.allocator import Allocator
    from compress.contract.format import Format
    from compress.corpus import Corpus

Executor = Literal["tokens", "stream", "sweep", "smooth", "train", "blocks", "slice", "rotate", "cache"]
"""What runs a pass over a checkpoint: the pipeline itself for tokens, a module of compress/executors/ for the rest."""


@dataclass(frozen=True)
class ExternalInputs:
    """Identities of what a pass may read besides the checkpoint; they go into a step's id."""

    tokens: str
    """Digest of the tokens that the step reads."""
    dtype: str
    """Compute dtype of models."""
    second_model: str = ""
    """Fingerprint of the other model that the step reads, if there is one."""


class Pass(BaseModel):
    """A frozen set of options."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )
    revision: ClassVar[int] = 1
    """Increased by hand when a change of code makes the same options give other bytes."""
    example: ClassVar[str] = ""
    """A recipe that ends in this pass, for its documentation and its tests; without one the pass works with its defaults."""
    example_family: ClassVar[str] = "llama"
    """The model_type that the example is for."""
    makes_tokens: ClassVar[bool] = False
    """Whether it makes calibration tokens and changes no weight."""
    unpacks: ClassVar[bool] = False
    """Whether it reads a packed artifact; such a pass is the first of its recipe."""
    second_model: ClassVar[Literal["", "teacher", "dense"]] = ""
    """Which other model it may read: a teacher, or the dense model that the codes were made from."""

    @classmethod
    def pass_name(cls) -> str:
        """`quantize.rtn` for the class in `passes/quantize/rtn.py`."""
        return cls.__module__.removeprefix("compress.passes.")

    @abstractmethod
    def executor(self) -> Executor:
        """What runs it over a checkpoint."""

    def worker(self) -> Pass:
        """The pass that does the work: itself, or the pass that it delegates to."""
        return self

    def allocator(self) -> Allocator | None:
        """What decides the state of each weight before shards are laid out; None if the options alone decide."""
        return None

    def learns_codes(self) -> bool:
        """Whether it trains codes, for which it reads the dense weights that they were made from, where they are known."""
        return False

    def reads_tokens(self) -> bool:
        """Whether it reads the calibration tokens that are stored with the checkpoint."""
        return False

    def own_tokens(self, model: Checkpoint, seed: int) -> Corpus | None:
        """Tokens of the texts that its options name, by the tokenizer of `model`. Raises InputError for unusable texts."""
        return None

    def source_notes(self) -> list[Note]:
        """Counted lines about the texts that it reads; they are also printed when a run begins."""
        return []

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        """Identities of what it reads besides the checkpoint, for the id of its step."""
        return {}

    def how_to_use_less_memory(self) -> str:
        """What a user can do if this machine has too little memory."""
        return "run it on fewer cores, as in `taskset -c 0 compress ...`"

    def line(self) -> Line:
        """The recipe line that makes this pass: options that differ from their defaults."""
        options = self.model_dump(mode="json", exclude_defaults=True)
        return Line(self.pass_name(), {key: _value(value) for key, value in options.items()})

    def redacted(self) -> Self:
        """This pass as it is written into a manifest, without paths of the machine."""
        return self

    def identity(self) -> dict[str, Any]:
        """This pass's part of a step's id: every option, defaults included, and the revision."""
        return {"pass": self.pass_name(), "revision": self.revision, "options": self.model_dump(mode="json")}


def _value(value: Any) -> Value:
    return tuple(value) if isinstance(value, list) else value


class WeightPass(Pass):
    """Base of passes that change weights."""

    @abstractmethod
    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that this pass targets."""

    @abstractmethod
    def becomes(self, weight: Weight, state: State) -> State:
        """The state of a targeted weight after this pass. Raises Refusal with the reason. Reads no bytes."""

    def layout(self, weights: Sequence[Weight], family: str, config: dict[str, Any]) -> Layout | None:
        """The activations that it rescales, with the weights that write and read them; None if it rescales none."""
        return None

    def target_format(self) -> Format | None:
        """The format that this pass writes; None for the canonical form."""
        return None

    def workspace_bytes(self, weight: Weight) -> int:
        """Memory that the work on one weight needs besides its old and new tensor: byte codes and temporaries."""
        return weight.numel * 3 // 2

    def left_alone(self, weights: Sequence[Weight]) -> dict[str, str]:
        """Weights that it would take but for the defaults of their family: name -> reason."""
        return {}

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        """Counted lines for the manifest about choices of this pass; `states` are the states after it."""
        return []


class TargetedPass(WeightPass):
    """A pass with the two fields that say which weights it works on."""

    targets: tuple[str, ...] = Field(
        ("linear",),
        description="weights to work on: linear, attention, mlp, experts, embeddings, head, norms, all, re:REGEX or a name",
    )
    skip: tuple[str, ...] = Field((), description="weights to leave alone, by the same selectors; wins over targets")

    @field_validator("targets", "skip", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("targets", "skip")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            selectors.check(value)
        except UsageError as error:
            raise ValueError(error.problems[0].got) from None
        return value

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        return selectors.select(weights, self.targets, self.skip)


class SparingPass(TargetedPass):
    """A pass that leaves alone what the table of the model's family names, whatever its targets are."""

    skip_defaults: bool = Field(
        True,
        description="leave alone what `compress plan` lists as such: small weights that decide much, e.g. in linear attention",
    )

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        found = super().chosen(weights)
        return [weight for weight in found if not weight.left_alone] if self.skip_defaults else found

    def left_alone(self, weights: Sequence[Weight]) -> dict[str, str]:
        """Also what is no matrix of weights, and so in none of the targets."""
        if not self.skip_defaults or not any(weight.left_alone for weight in weights):
            return {}
        found = [*super().chosen(weights), *(weight for weight in weights if weight.kind == "other")]
        return {weight.name: weight.left_alone for weight in found if weight.left_alone}
