"""Objective: what a training run minimizes, and what it learns besides weights.

A pass is a frozen set of options, so what a run keeps from step to step lies here: `TrainPass.objective` makes one for each
run, in every process. It has the loss, and it may have parameters of its own (projections, masks, multipliers). They have an
optimizer of their own, are saved in the training state with the weights, and are never written as weights. Since no wrapper
knows of them, the executor sums their gradients over processes. All processes make the same ones, from the same seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.checkpoint.reader import Checkpoint
    from compress.contract.tasks import TrainingBatch
    from compress.contract.training_options import TrainingOptions

Metric = float | list[float]
"""A number of a step, or one for each layer or domain."""


@dataclass(frozen=True)
class Models:
    """What an objective is made for."""

    student: Any
    """transformers' own model, on its device: hooks go on its modules. It is called through what `loss` is given."""
    teacher: Any
    """A model of transformers that is not trained, or None."""
    source: Checkpoint
    """The checkpoint that the student was read from."""
    teacher_source: Checkpoint | None
    options: TrainingOptions
    seed: int


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch."""

    value: torch.Tensor
    """fp32 scalar, summed over the batch's scored tokens. A step's is divided by its scored tokens over all processes, so
    what adds up over tokens does not depend on how a step is divided."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Sums of the same kind, recorded for every step by names that training.jsonl does not have yet; a vector as a list."""


@dataclass(frozen=True)
class OwnParameters:
    """Parameters of an objective that are trained alike, by AdamW with the run's betas; their gradients are not clipped."""

    parameters: dict[str, nn.Parameter]
    """fp32, on the student's device, by names that no two of an objective share; they identify it in the training state."""
    lr: float
    """Peak learning rate."""
    rate: Callable[[int, int], float] | None = None
    """(step, steps) -> the learning rate as a share of the peak; None is the run's own schedule."""
    maximize: bool = False
    """Gradient ascent, as for the multiplier of a constraint."""
    weight_decay: float = 0.0


class Objective(ABC):
    """What one training run minimizes. Only `loss` has to be there; the other methods do nothing unless they are needed."""

    @abstractmethod
    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> Loss:
        """The loss of a micro-batch, maybe one without scored tokens; both models are called like models of transformers."""

    def own(self) -> Sequence[OwnParameters]:
        """What it learns besides the student's weights; always the same objects."""
        return ()

    def buffers(self) -> dict[str, torch.Tensor]:
        """Tensors that change during a run without being trained. They are saved with the state, and restored in place."""
        return {}

    def prepare(self, batches: Iterable[TrainingBatch], add_up: Callable[[torch.Tensor], None]) -> None:  # noqa: B027
        """Measures what it needs before the first step, on this process's micro-batches of that step.

        `add_up` sums a tensor over processes in place. A run that goes on from a saved state restores `buffers` instead.
        """

    def begin_step(self, step: int, steps: int) -> None:  # noqa: B027
        """Called before each step 0, 1, ..., in every process. What is drawn at random is a function of seed and step."""

    def penalty(self) -> torch.Tensor | None:
        """A scalar that a step adds once, whatever its batch, such as a constraint on `own`; recorded, not part of the loss."""
        return None

    def metrics(self) -> dict[str, Metric]:
        """Further numbers to record of the step that was done; the same in every process."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Removes its hooks; called when the last step is done or has failed."""


class LossObjective(Objective):
    """The loss of a pass that needs nothing besides."""

    def __init__(self, loss: Callable[[TrainingBatch, Any, Any], torch.Tensor]) -> None:
        self._loss = loss

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> Loss:
        return Loss(self._loss(batch, student, teacher))
