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
    """Of AdamW, for weights."""
    scale_lr: float = 5e-3
    """For scales of codes, as a share of each scale."""
    curve: Curve = "cosine"
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    final: float = 0.0
    """What the learning rate falls to, as a share of the highest."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    """On matrices only; never on norms, biases and scales."""
    clip: float = 1.0
    """Largest norm of a step's gradient; 0 for any."""
    recompute: bool = False
    """Whether blocks are computed again in the backward pass instead of being kept (activation checkpointing)."""
    save_every: int = 100
    """Steps between the states that a run can go on from."""

    def steps(self, samples: int) -> int:
        """Optimizer steps; the last one may have fewer samples."""
        return -(-samples * self.epochs // self.batch)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ... as a share of the highest."""
        rising = max(1, round(self.warmup * steps)) if self.warmup else 0
        if step < rising:
            return (step + 1) / rising
        if self.curve == "constant":
            return 1.0
        # `final` would be reached by the step after the last: a step at 0 would be none.
        done = (step - rising) / max(1, steps - rising)
        shape = 1 - done if self.curve == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * shape
