"""Shapes: the kinds of work that a pass can do, and what each hands over.

    DataPass          texts become calibration tokens            executor: the pipeline
    TensorPass        data-free, weight by weight                executor: stream
    LinearPass        weight by weight, from what it reads       executor: sweep
    CompensatingPass  what codes have lost, from dense weights   executor: stream, or sweep for a LinearPass that observes
    SmoothingPass     activation by activation                   executor: smooth (smoothing_pass.py)
    TrainPass         the whole model, by gradients of a loss    executor: train
    DelegatingPass    decides, and leaves the work to another    executor: that of its worker

A pass that trains one block at a time towards the outputs of its dense twin gets its shape here as well, and an executor
beside `sweep`: what it says are the parameters of a block that are trained, and the loss between two outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from compress.contract.pass_base import Executor, ExternalInputs, Pass, TargetedPass, WeightPass
from compress.contract.tasks import MatrixTask, Solution, Statistic, TrainingBatch
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.contract.training_options import TrainingOptions
    from compress.corpus import Corpus, CorpusSpec
    from compress.numerics.qtensor import QTensor


class DataPass(Pass):
    """Makes calibration tokens. They travel with the checkpoint until it is packed; its weights stay where they are."""

    makes_tokens: ClassVar[bool] = True

    def executor(self) -> Executor:
        return "tokens"

    @abstractmethod
    def tokens_at_most(self) -> tuple[int, int]:
        """How many tokens it will make, and how many in a sample, for the plan of memory."""

    @abstractmethod
    def own_tokens(self, model: Checkpoint, seed: int) -> Corpus: ...

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        return {"tokens": found.tokens}


class TensorPass(WeightPass):
    """Data-free work, one weight at a time."""

    def executor(self) -> Executor:
        return "stream"

    @abstractmethod
    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        """The new value, and its relative error or None where it means the same; a dense value is [experts?, rows, columns]."""


class ObservingPass(TargetedPass):
    """Work from statistics of what weights read."""

    @abstractmethod
    def statistic(self, width: int) -> Statistic:
        """An empty statistic of inputs of that width."""

    @abstractmethod
    def statistic_bytes(self, width: int) -> int:
        """Memory of a statistic, and of what `prepare` makes of it while it works."""

    def prepare(self, statistic: Any) -> Any:
        """What all weights that read the same inputs share; computed once."""
        return statistic

    def observes(self) -> bool:
        """Whether it needs statistics at all; with options that need none, a pass that can do without is no sweep."""
        return True

    def executor(self) -> Executor:
        return "sweep" if self.observes() else "stream"

    def reads_tokens(self) -> bool:
        return self.observes()

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        return {"tokens": found.tokens, "dtype": found.dtype} if self.observes() else {}

    def how_to_use_less_memory(self) -> str:
        return "calibrate on fewer tokens"


class LinearPass(ObservingPass):
    """Work on weights from statistics of what they read."""

    @abstractmethod
    def solve(self, tasks: Sequence[MatrixTask], prepared: Any) -> list[Solution]:
        """The new values of weights that read the same inputs."""


class CompensatingPass(TargetedPass):
    """Makes up for what rounding has lost, with the dense weights at hand that the codes were made from; see dense_parent.py."""

    second_model: ClassVar[Literal["", "teacher", "dense"]] = "dense"

    dense: str = Field(
        "", description="what the codes were made from, a directory or a Hub id; needed only where no manifest tells"
    )

    @abstractmethod
    def compensate(self, weight: Weight, q: QTensor, after: State, dense: torch.Tensor) -> tuple[QTensor, float]:
        """The codes with what stands beside them, and the relative error; `dense` as [experts?, rows, columns]."""

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        return super().external_inputs(found) | ({"dense": found.second_model} if found.second_model else {})

    def redacted(self) -> Self:
        """A checkpoint by its last part: its content is in the lineage, and folders of a machine are not told."""
        return self.model_copy(update={"dense": self.dense.rstrip("/").rpartition("/")[2]})


class TrainPass(TargetedPass):
    """Gradient training of the whole model."""

    second_model: ClassVar[Literal["", "teacher", "dense"]] = "teacher"

    def executor(self) -> Executor:
        return "train"

    def texts(self) -> CorpusSpec | None:
        """What to train on; None for the calibration tokens that travel with the checkpoint."""
        return None

    @abstractmethod
    def training_options(self) -> TrainingOptions:
        """How to train."""

    def teacher_model(self) -> str | None:
        """The model that teaches: a directory, a Hub id, or empty for the dense parent; None where there is none."""
        return None

    @abstractmethod
    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> torch.Tensor:
        """The sum over the batch's scored tokens, fp32; both are called like models of transformers."""

    def reads_tokens(self) -> bool:
        return self.texts() is None

    def own_tokens(self, model: Checkpoint, seed: int) -> Corpus | None:
        from compress.corpus import build_for

        texts = self.texts()
        return None if texts is None else build_for(texts, model, seed)

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        taught = {"teacher": found.second_model} if found.second_model else {}
        return {"tokens": found.tokens, "dtype": found.dtype, **taught}

    def how_to_use_less_memory(self) -> str:
        return "lower micro_batch or length, or set recompute=true"


class DelegatingPass(WeightPass):
    """Chooses weights and states, and leaves the work on them to another pass."""

    @abstractmethod
    def worker(self) -> Pass: ...

    def executor(self) -> Executor:
        return self.worker().executor()

    def reads_tokens(self) -> bool:
        allocator = self.allocator()
        return self.worker().reads_tokens() or (allocator is not None and allocator.reads_gradients)

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        allocator = self.allocator()
        if allocator is None or not allocator.gradients:
            return self.worker().external_inputs(found)
        table = {"allocation": digest} if (digest := allocator.table_digest()) else {}
        return {"tokens": found.tokens, "dtype": found.dtype, **table}

    def how_to_use_less_memory(self) -> str:
        return self.worker().how_to_use_less_memory()
