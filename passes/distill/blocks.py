"""Trains each block towards the outputs of the same block of the dense model.

Block-wise reconstruction: after any mask or rounding, what is left to train of a block is trained by gradients until its outputs
are closest to those of the dense model's block, one block after the other ("A free lunch in LLM compression",
2510.14444). It needs the memory of one block, and no logits. Codes and zeros do not change.

    target=dense  the twin's block on the twin's own inputs: a block also makes up for errors of the blocks before it
    target=local  the twin's block on the inputs that the student's block gets

The embedding, the last norm and the head lie outside of blocks and are not trained.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.block_training import BlockOptions, BlockTrainPass

if TYPE_CHECKING:
    import torch


class Blocks(BlockTrainPass):
    """Heals the blocks of a pruned or quantized model, one at a time."""

    example: ClassVar[str] = "calibrate | prune.magnitude(sparsity=2:4) | distill.blocks(epochs=2, batch=2, micro_batch=1)"

    teacher: str = Field("", description="a directory or a Hub id; without it, the dense model that this one was made from")
    target: Literal["dense", "local"] = Field(
        "dense", description="what a block is trained towards: the dense model's stream, or its block on the same inputs"
    )
    error: Literal["relative", "squared"] = Field(
        "relative", description="squared error of a token's output, as a share of the target's energy or in all"
    )
    epochs: int = Field(2, ge=0, description="how often each block sees each calibration sample; 0 leaves all as it was")
    batch: int = Field(4, ge=1, description="samples in an optimizer step, over all processes")
    micro_batch: int = Field(4, ge=1, description="samples in one forward of one process")
    lr: float = Field(3e-4, ge=0, le=1e30, description="peak learning rate of weights")
    scale_lr: float = Field(
        5e-3, ge=0, le=1e30, description="peak learning rate of the scales of codes, as a share of each scale"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the learning rate decays")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of a block's steps over which the learning rate rises")
    final: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two betas")
    clip: float = Field(1.0, ge=0, description="gradients are scaled down to at most this norm; 0 for no limit")
    held_out: float = Field(
        0.1, ge=0, le=0.5, description="share of the samples that only compares iterates; 0 to compare by those trained on"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="the iterate of each epoch, and the start, that a block ends at: of least loss, or the last"
    )

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

    def block_options(self) -> BlockOptions:
        return BlockOptions(
            epochs=self.epochs, batch=self.batch, micro_batch=self.micro_batch, lr=self.lr, scale_lr=self.scale_lr,
            curve=self.schedule, warmup=self.warmup, final=self.final, betas=self.betas, clip=self.clip,
            held_out=self.held_out, keep=self.keep, target=self.target,
        )  # fmt: skip

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        import torch

        squares = (output - target).square().sum(-1)
        energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return squares / energy if self.error == "relative" else squares
