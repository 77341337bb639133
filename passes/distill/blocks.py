"""Trains each block towards the outputs of the same block of the dense model.

Block-wise reconstruction: after any mask or rounding, what is left to train of a block is trained by gradients until its outputs
are closest to those of the dense model's block, one block after the other ("A free lunch in LLM compression",
2510.14444). It needs the memory of one block, and no logits. Codes and zeros do not change.

    target=dense  the twin's block on the twin's own inputs: a block also makes up for errors of the blocks before it
    target=local  the twin's block on the inputs that the student's block gets

The embedding, the last norm and the head lie outside of blocks and are not trained.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.contract.block_training import BlockOptions, BlockReconstruction


class Blocks(BlockReconstruction):
    """Heals the blocks of a pruned or quantized model, one at a time."""

    example: ClassVar[str] = "calibrate | prune.magnitude(sparsity=2:4) | distill.blocks(epochs=2, batch=2, micro_batch=1)"

    lr: float = Field(3e-4, ge=0, le=1e30, description="peak learning rate of weights")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of a block's steps over which the learning rate rises")
    final: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    clip: float = Field(1.0, ge=0, description="gradients are scaled down to at most this norm; 0 for no limit")

    def block_options(self) -> BlockOptions:
        return BlockOptions(
            epochs=self.epochs, batch=self.batch, micro_batch=self.micro_batch, lr=self.lr, scale_lr=self.scale_lr,
            curve=self.schedule, warmup=self.warmup, final=self.final, betas=self.betas, clip=self.clip,
            held_out=self.held_out, keep=self.keep, target=self.target,
        )  # fmt: skip
