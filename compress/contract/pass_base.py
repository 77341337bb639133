"""Pass base: what a pass answers, and the shapes that it can have.

    DataPass     texts become calibration tokens             driver: the pipeline
    TensorPass   data-free, weight by weight                 driver: stream
    LinearPass   weight by weight, from what it reads        driver: sweep
    TrainPass    the whole model, by gradients of a loss     driver: train

A fifth, which decides what another one then does, stands in deciding.py. A pass module defines exactly one Pass class. Its
fields are the recipe keys, the flags and the help text; its docstring's first line is its line in `compress list`. Modules of
passes import torch inside their methods only, so that help and plans of recipes start fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.errors import UsageError
from compress.spec import selectors
from compress.spec.recipe import Line, Value
from compress.spec.weight_state import Note, State, Weight

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.contract.format import Format
    from compress.contract.training_options import TrainingOptions
    from compress.corpus import Corpus, CorpusSpec
    from compress.numerics.qtensor import QTensor


class Pass(BaseModel):
    """A frozen set of options."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )
    revision: ClassVar[int] = 1
    """Raised by hand when the same options give other bytes."""

    @classmethod
    def pass_name(cls) -> str:
        """`quantize.rtn` for the class in `passes/quantize/rtn.py`."""
        return cls.__module__.removeprefix("compress.passes.")

    def line(self) -> Line:
        """The recipe line that makes this pass: options that differ from their defaults."""
        options = self.model_dump(mode="json", exclude_defaults=True)
        return Line(self.pass_name(), {key: _value(value) for key, value in options.items()})

    def redacted(self) -> Self:
        """This pass as a manifest tells of it, without the folders of the machine that it ran on."""
        return self

    def identity(self) -> dict[str, Any]:
        """What of this pass goes into a step's id: every option, defaults included, and the revision."""
        return {"pass": self.pass_name(), "revision": self.revision, "options": self.model_dump(mode="json")}


def _value(value: Any) -> Value:
    return tuple(value) if isinstance(value, list) else value


class DataPass(Pass):
    """Makes calibration tokens. They travel with the checkpoint until it is packed; its weights stay where they are."""

    def tokens_at_most(self) -> tuple[int, int]:
        """How many tokens it will make, and how many in a sample, for the plan of memory."""
        raise TypeError(f"{type(self).__name__} gathers nothing")

    def gather(self, model: Checkpoint, seed: int) -> Corpus:
        """The tokens, by the tokenizer of `model`. Raises InputError for texts that cannot be used."""
        raise TypeError(f"{type(self).__name__} gathers nothing")

    def notes(self) -> list[Note]:
        """Counted lines about what it reads."""
        return []


class WeightPass(Pass):
    """What passes over weights have in common."""

    unpacks: ClassVar[bool] = False
    """Whether it reads a packed artifact; such a pass is the first of its recipe."""

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that this pass targets."""
        raise TypeError(f"{type(self).__name__} does not say which weights it targets")

    def becomes(self, weight: Weight, state: State) -> State:
        """What a targeted weight is after this pass. Raises Refusal with the reason. Reads no bytes."""
        raise TypeError(f"{type(self).__name__} does not say what a weight becomes")

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


class TensorPass(WeightPass):
    """Data-free work, one weight at a time; lifted to directory in, directory out by `stream`."""

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        """The new value, and its relative error or None where it means the same; a dense value is [experts?, rows, columns]."""
        raise TypeError(f"{type(self).__name__} does not transform")


class Statistic(Protocol):
    """What is folded of the inputs that a weight reads; additive, so that processes can sum theirs."""

    tokens: int

    def add(self, x: torch.Tensor) -> None:
        """Folds in inputs [tokens, width] of any float dtype."""

    def parts(self) -> list[torch.Tensor]:
        """The sums, to be added up over processes in place."""


@dataclass(frozen=True)
class MatrixTask:
    """One matrix to solve: a weight, or one expert of a fused one. `value` [out, in] in the stored dtype."""

    weight: Weight
    after: State
    value: torch.Tensor
    codes: QTensor | None = None
    """For a CompensatingPass: what `value` has become, in the rows and columns of the quantized form."""


@dataclass(frozen=True)
class Solution:
    """The new value of a matrix, a tensor [out, in] or codes [rows, columns], with squared norms of what it cost."""

    value: torch.Tensor | QTensor
    lost: float
    """|W - W'|^2."""
    norm: float
    output_lost: float
    """|(W - W') x|^2, per calibration token."""
    output_norm: float
    note: tuple[str, str] | None = None
    """(what, reason) where the matrix was not solved as asked; counted in the manifest."""


class LinearPass(TargetedPass):
    """Work on weights from statistics of what they read; lifted to directory in, directory out by `sweep`."""

    def statistic(self, width: int) -> Statistic:
        """An empty statistic of inputs of that width."""
        raise TypeError(f"{type(self).__name__} observes nothing")

    def statistic_bytes(self, width: int) -> int:
        """Memory of a statistic, and of what `prepare` makes of it while it works."""
        raise TypeError(f"{type(self).__name__} observes nothing")

    def prepare(self, statistic: Any) -> Any:
        """What all weights that read the same inputs share; computed once."""
        return statistic

    def solve(self, tasks: Sequence[MatrixTask], prepared: Any) -> list[Solution]:
        """The new values of weights that read the same inputs."""
        raise TypeError(f"{type(self).__name__} solves nothing")

    def observes(self) -> bool:
        """Whether it needs statistics at all; with options that need none, a pass that can do without is no sweep."""
        return True


def sweeps(pass_: Pass) -> TypeGuard[LinearPass]:
    """Whether a pass is lifted by `sweep`."""
    return isinstance(pass_, LinearPass) and pass_.observes()


class CompensatingPass(TargetedPass):
    """Makes up for what rounding has lost, with the dense weights at hand that the codes were made from; see dense_parent.py.

    Lifted by `stream`, or by `sweep` where it is a LinearPass that observes.
    """

    dense: str = Field(
        "", description="what the codes were made from, a directory or a Hub id; needed only where no manifest tells"
    )

    def compensate(self, weight: Weight, q: QTensor, after: State, dense: torch.Tensor) -> tuple[QTensor, float]:
        """The codes with what stands beside them, and the relative error; `dense` as [experts?, rows, columns]."""
        raise TypeError(f"{type(self).__name__} makes up for nothing")

    def redacted(self) -> Self:
        """A checkpoint by its last part: its content is in the lineage, and a path is nobody's business."""
        return self.model_copy(update={"dense": self.dense.rstrip("/").rpartition("/")[2]})


@dataclass(frozen=True)
class TrainingBatch:
    """A few samples of training: the model's arguments, and which of its outputs count."""

    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor
    """Of the logits [samples * length, vocabulary], the rows that count: int64 [scored]."""
    labels: torch.Tensor
    """The token that each of these rows should predict: int64 [scored]."""


class TrainPass(TargetedPass):
    """Gradient training of the whole model; lifted to directory in, directory out by `train`."""

    def texts(self) -> CorpusSpec | None:
        """What to train on; None for the calibration tokens that travel with the checkpoint."""
        return None

    def training_options(self) -> TrainingOptions:
        """How to train."""
        raise TypeError(f"{type(self).__name__} does not train")

    def teacher_model(self) -> str | None:
        """The model that teaches: a directory, a Hub id, or empty for the dense parent; None where there is none."""
        return None

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> torch.Tensor:
        """The sum over the batch's scored tokens, fp32; both are called like models of transformers."""
        raise TypeError(f"{type(self).__name__} has no loss")
