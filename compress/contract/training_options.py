"""Training options: how a pass trains, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Curve = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class TrainingOptions:
    """The settings of a training run; samples are counted over all processes."""

    epochs: int = 1
    batch: int = 16
    """Samples of an optimizer step."""
    micro_batch: int = 4
    """Samples of one forward of one process."""
    lr: float = 1e-4
    """Peak learning rate of AdamW, for weights."""
    scale_lr: float = 5e-3
    """Peak learning rate of scales of codes, as a share of each scale."""
    code_lr: float | None = 1e-3
    """Peak learning rate of the offsets of codes, in steps of codes; for blocks, None for one over the optimizer's steps."""
    curve: Curve = "cosine"
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    final: float = 0.0
    """The learning rate at the end, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    """Weight decay, on matrices only; never on norms, biases and scales."""
    clip: float = 1.0
    """Norm that gradients are clipped to; 0 for no limit."""
    recompute: bool = False
    """Whether blocks are computed again in the backward pass instead of being kept (activation checkpointing)."""
    save_every: int = 100
    """Steps between saved training states."""

    def steps(self, samples: int) -> int:
        """Optimizer steps; the last one may have fewer samples."""
        return -(-samples * self.epochs // self.batch)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ... as a share of the peak."""
        rising = max(1, round(self.warmup * steps)) if self.warmup else 0
        if step < rising:
            return (step + 1) / rising
        if self.curve == "constant":
            return 1.0
        # `final` is reached after the last step: a step with a learning rate of 0 would change nothing.
        done = (step - rising) / max(1, steps - rising)
        shape = 1 - done if self.curve == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * shape
