"""Shapes: the kinds of work that a pass can do, and the methods of each.

    DataPass          texts become calibration tokens            executor: the pipeline
    TensorPass        data-free, weight by weight                executor: stream
    LinearPass        weight by weight, from its inputs          executor: sweep
    CompensatingPass  corrects codes, from dense weights         executor: stream, or sweep for a LinearPass that observes
    SmoothingPass     activation by activation                   executor: smooth (smoothing_pass.py)
    TrainPass         the whole model, by gradients              executor: train (train_pass.py)
    LossPass          a TrainPass whose loss needs only a batch  executor: train (train_pass.py)
    BlockTrainPass    block by block, by gradients of a loss     executor: blocks (block_training.py)
    SlicingPass       a smaller model of the kept parts          executor: slice, or train (slicing_pass.py)
    RotatingPass      channels rotated, the function kept        executor: rotate (rotating_pass.py)
    CachePass         scales of keys and values                  executor: cache (cache_pass.py)
    DelegatingPass    decides, and delegates the work            executor: that of its worker

Executors are modules of compress/executors/, by these names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from compress.contract.pass_base import Executor, ExternalInputs, Pass, TargetedPass, WeightPass
from compress.contract.tasks import MatrixTask, Solution, Statistic
from compress.errors import UsageError
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.corpus import Corpus
    from compress.numerics.qtensor import QTensor


Route = Annotated[
    Literal["router", "all"],
    Field(
        description="what routed experts are calibrated on: tokens that the router sends them, or all; outputs follow the router"
    ),
]


class DataPass(Pass):
    """Makes calibration tokens. They are stored with the checkpoint until it is packed; its weights are not changed."""

    makes_tokens: ClassVar[bool] = True

    def executor(self) -> Executor:
        return "tokens"

    @abstractmethod
    def tokens_at_most(self) -> tuple[int, int]:
        """(most tokens that it makes, most in a sample), for the plan of memory."""

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
        """The new value, and its relative error, None if nothing is lost; a dense value is [experts?, rows, columns]."""


class ObservingPass(TargetedPass):
    """Work from statistics of the inputs of weights."""

    route: Route = "router"

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        found = super().chosen(weights)
        if self.route == "all" and not (self.observes() and any(weight.kind == "expert" for weight in found)):
            raise UsageError(f"{self.pass_name()}.route", "all where routed experts are calibrated", "none here", "leave it out")
        return found

    @abstractmethod
    def statistic(self, width: int) -> Statistic:
        """An empty statistic of inputs of that width."""

    @abstractmethod
    def statistic_bytes(self, width: int) -> int:
        """Memory of a statistic, including what `prepare` needs."""

    def prepare(self, statistic: Any) -> Any:
        """Computes, once, from the statistic what all weights with the same inputs share."""
        return statistic

    def two_streams(self) -> bool:
        """Whether a sweep shows it the inputs of the unchanged model beside those of the one that it changes."""
        return False

    def corrects_residual(self) -> bool:
        """With two streams: whether it is also shown how far the residual streams are apart where outputs are added to them."""
        return False

    def weighs_outputs(self) -> bool:
        """Whether it is given the Gram matrices of gradients by outputs, from a gradient sweep before its own."""
        return False

    def observes(self) -> bool:
        """Whether it needs statistics with these options; if not, the pass is streamed."""
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
    """Solves weights from statistics of their inputs."""

    @abstractmethod
    def solve(self, tasks: Sequence[MatrixTask], prepared: Any) -> list[Solution]:
        """The new values of matrices that share their inputs, from what `prepare` returned."""


class CompensatingPass(TargetedPass):
    """Corrects the rounding of codes, given the dense weights that they were made from; see dense_parent.py."""

    second_model: ClassVar[Literal["", "teacher", "dense"]] = "dense"

    dense: str = Field(
        "", description="the dense model of the codes, a directory or a Hub id; needed only if no manifest names it"
    )

    @abstractmethod
    def compensate(self, weight: Weight, q: QTensor, after: State, dense: torch.Tensor) -> tuple[QTensor, float]:
        """The codes with their correction (low-rank factors), and the relative error; `dense` is [experts?, rows, columns]."""

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        return super().external_inputs(found) | ({"dense": found.second_model} if found.second_model else {})

    def redacted(self) -> Self:
        """The dense checkpoint's name instead of its path: the lineage identifies its content, and paths are private."""
        return self.model_copy(update={"dense": self.dense.rstrip("/").rpartition("/")[2]})


class DelegatingPass(WeightPass):
    """Chooses weights and states, and delegates the work on them to another pass."""

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
