"""Block training: the shape of passes that train one block at a time.

A block of the model is trained towards the outputs of the same block of its dense twin, the model that it was made from.
The executor is executors/blocks.py; it holds one block with what is trained of it in memory. What is trained of a weight
depends on its state, as in training of the whole model: a dense weight, the entries between its zeros, scales, factors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.contract.base_passes import LearningPass
from compress.contract.pass_base import Executor, ExternalInputs
from compress.contract.training_options import TrainingOptions
from compress.errors import Refusal
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

Stream = Literal["dense", "local"]
"""What a block of the twin computes its targets from: the twin's own stream, or the inputs of the student's block."""


@dataclass(frozen=True)
class BlockOptions(TrainingOptions):
    """The settings of one block's training; every block is trained by the same ones."""

    held_out: float = 0.1
    """Share of the samples that is not trained on, by which iterates are compared; 0 to compare by the others."""
    keep: Literal["best", "last"] = "best"
    """Whether the block ends at its best iterate, the one before training included, or at the last one."""
    target: Stream = "dense"


class BlockTrainPass(LearningPass):
    """Training of one block after the other towards the outputs of its dense twin."""

    second_model: ClassVar[Literal["", "teacher", "dense"]] = "teacher"

    def executor(self) -> Executor:
        return "blocks"

    @abstractmethod
    def block_options(self) -> BlockOptions:
        """How to train each block."""

    @abstractmethod
    def teacher_model(self) -> str:
        """The dense twin: a directory, a Hub id, or empty for the dense parent."""

    def second_name(self) -> str:
        """The other model that it reads: its twin."""
        return self.teacher_model()

    @abstractmethod
    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of each token, fp32 [tokens]; the outputs of both blocks are fp32 [tokens, width]."""

    def reads_tokens(self) -> bool:
        return True

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        return {"tokens": found.tokens, "dtype": found.dtype, "teacher": found.second_model}

    def how_to_use_less_memory(self) -> str:
        return "lower micro_batch, or calibrate on fewer tokens"

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        # `all` and `norms` also match what lies outside of blocks; without anything inside, `becomes` says why not.
        found = super().chosen(weights)
        return [weight for weight in found if _in_a_block(weight)] or found

    def becomes(self, weight: Weight, state: State) -> State:
        if not _in_a_block(weight):
            reason = f"it is a {weight.kind} outside of the text model's blocks, which alone are trained"
            raise Refusal(reason, "leave it out of targets")
        return super().becomes(weight, state) if "all" not in self.targets else state


def _in_a_block(weight: Weight) -> bool:
    return weight.block is not None and not weight.stack.startswith("tower:")
