"""Pass base: what every pass answers, whatever its shape.

A pass module defines exactly one Pass class that is not abstract. Its fields are the recipe keys, the flags and the help text;
its docstring's first line is its line in `compress list`. Modules of passes import torch inside their methods only, so that
help and plans of recipes start fast. The shapes that a pass can have stand in shapes.py.
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

Executor = Literal["tokens", "stream", "sweep", "smooth", "train"]
"""What lifts a pass to a directory: the pipeline itself for tokens, and modules of compress/executors/ for the rest."""


@dataclass(frozen=True)
class ExternalInputs:
    """What passes may read besides the checkpoint, as it goes into a step's id."""

    tokens: str
    """Digest of the tokens that the step reads."""
    dtype: str
    """What models compute in."""
    second_model: str = ""
    """Fingerprint of the other model that the step reads, if there is one."""


class Pass(BaseModel):
    """A frozen set of options."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )
    revision: ClassVar[int] = 1
    """Raised by hand when the same options give other bytes."""
    example: ClassVar[str] = ""
    """A recipe that ends in this pass, for its documentation and its tests; without one the pass works with its defaults."""
    example_family: ClassVar[str] = "llama"
    """The model_type that the example is for."""
    makes_tokens: ClassVar[bool] = False
    """Whether it makes calibration tokens, and leaves weights where they are."""
    unpacks: ClassVar[bool] = False
    """Whether it reads a packed artifact; such a pass is the first of its recipe."""
    second_model: ClassVar[Literal["", "teacher", "dense"]] = ""
    """Which other model it may read: one that teaches it, or the dense one that its codes were made from."""

    @classmethod
    def pass_name(cls) -> str:
        """`quantize.rtn` for the class in `passes/quantize/rtn.py`."""
        return cls.__module__.removeprefix("compress.passes.")

    @abstractmethod
    def executor(self) -> Executor:
        """What lifts it to a directory."""

    def worker(self) -> Pass:
        """The pass that does the work: itself, or the one that it leaves it to."""
        return self

    def allocator(self) -> Allocator | None:
        """What decides the state of each weight before bytes are laid out; None where options say it already."""
        return None

    def reads_tokens(self) -> bool:
        """Whether it reads the calibration tokens that travel with the checkpoint."""
        return False

    def own_tokens(self, model: Checkpoint, seed: int) -> Corpus | None:
        """Tokens of texts that it names itself, by the tokenizer of `model`. Raises InputError for texts that cannot be used."""
        return None

    def source_notes(self) -> list[Note]:
        """Counted lines about what it reads, which are also told when a run begins."""
        return []

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        """What it reads besides the checkpoint, for the id of a step."""
        return {}

    def how_to_use_less_memory(self) -> str:
        """What a user can do where this machine has too little."""
        return "run it on fewer cores, as in `taskset -c 0 compress ...`"

    def line(self) -> Line:
        """The recipe line that makes this pass: options that differ from their defaults."""
        options = self.model_dump(mode="json", exclude_defaults=True)
        return Line(self.pass_name(), {key: _value(value) for key, value in options.items()})

    def redacted(self) -> Self:
        """This pass as a manifest has it, without the folders of the machine that it ran on."""
        return self

    def identity(self) -> dict[str, Any]:
        """What of this pass goes into a step's id: every option, defaults included, and the revision."""
        return {"pass": self.pass_name(), "revision": self.revision, "options": self.model_dump(mode="json")}


def _value(value: Any) -> Value:
    return tuple(value) if isinstance(value, list) else value


class WeightPass(Pass):
    """What passes over weights have in common."""

    @abstractmethod
    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that this pass targets."""

    @abstractmethod
    def becomes(self, weight: Weight, state: State) -> State:
        """What a targeted weight is after this pass. Raises Refusal with the reason. Reads no bytes."""

    def layout(self, weights: Sequence[Weight], family: str, config: dict[str, Any]) -> Layout | None:
        """The activations that it rescales, with all weights that write and read them; None for a pass that rescales none."""
        return None

    def target_format(self) -> Format | None:
        """The format that this pass writes; None for the canonical form."""
        return None

    def workspace_bytes(self, weight: Weight) -> int:
        """Memory for the work on one weight, besides its tensor before and after: byte codes and temporaries."""
        return weight.numel * 3 // 2

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        """Counted lines for the manifest about choices this pass made; `states` are those after it."""
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
