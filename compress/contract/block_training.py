"""Block training: the shape of passes that train one block at a time.

A block of the model is trained towards the outputs of the same block of its dense twin, the model that it was made from.
The executor is executors/blocks.py; it holds one block with what is trained of it in memory. What is trained of a weight
depends on its state, as in training of the whole model: a dense weight, the entries between its zeros, scales, factors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.base_passes import LearningPass, refuse_columns
from compress.contract.pass_base import Executor, ExternalInputs
from compress.contract.training_options import Curve, TrainingOptions
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
    optimizer: Literal["adamw", "sign"] = "adamw"
    reach: float = 0.5
    """How far an offset may move a code, in steps."""


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
        if self.learns_codes():
            refuse_columns(state)
        return super().becomes(weight, state) if "all" not in self.targets else state


class BlockReconstruction(BlockTrainPass):
    """Options of training blocks towards the outputs of their dense twins, by whatever is trained of them."""

    teacher: str = Field("", description="a directory or a Hub id; without it, the dense model that this one was made from")
    target: Stream = Field(
        "dense", description="what a block is trained towards: the dense model's stream, or its block on the same inputs"
    )
    error: Literal["relative", "squared"] = Field(
        "relative", description="squared error of a token's output, as a share of the target's energy or in all"
    )
    epochs: int = Field(2, ge=0, description="how often each block sees each calibration sample; 0 leaves all as it was")
    batch: int = Field(4, ge=1, description="samples in an optimizer step, over all processes")
    micro_batch: int = Field(4, ge=1, description="samples in one forward of one process")
    schedule: Curve = Field("cosine", description="how the learning rate decays")
    held_out: float = Field(
        0.1, ge=0, le=0.5, description="share of the samples that only compares iterates; 0 to compare by those trained on"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="the iterate of each epoch, and the start, that a block ends at: of least loss, or the last"
    )
    scale_lr: float = Field(
        5e-3, ge=0, le=1e30, description="peak learning rate of the scales of codes, as a share of each scale"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two betas")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas are from 0 to below 1")
        if self.micro_batch > self.batch:
            raise ValueError(f"micro_batch={self.micro_batch} is more than batch={self.batch}: a step has no part of a forward")
        return self

    def redacted(self) -> Self:
        """The teacher's name instead of its path; its content is identified by a digest."""
        return self.model_copy(update={"teacher": PurePath(self.teacher).name}) if self.teacher else self

    def teacher_model(self) -> str:
        return self.teacher

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        import torch

        squares = (output - target).square().sum(-1)
        energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return squares / energy if self.error == "relative" else squares


def _in_a_block(weight: Weight) -> bool:
    return weight.block is not None and not weight.stack.startswith("tower:")
