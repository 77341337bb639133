"""Trains a checkpoint in any state on texts alone: continued pre-training.

The loss is the cross entropy of the next token. It is what a pruned model is usually trained further by when it has many
tokens of its domains, and the baseline that distillation has to beat on few. Codes and zeros do not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from compress.contract.base_passes import TrainingPass
from compress.contract.tasks import TrainingBatch
from compress.contract.train_pass import LossPass

if TYPE_CHECKING:
    import torch


class Lm(TrainingPass, LossPass):
    """Lowers the cross entropy of a model's next-token predictions."""

    example: ClassVar[str] = "calibrate | prune.magnitude(sparsity=2:4) | train.lm(batch=4, micro_batch=2)"

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> torch.Tensor:
        from compress.numerics.divergence import loss_sum

        logits: torch.Tensor = student(**batch.inputs, use_cache=False).logits
        return loss_sum(None, logits.flatten(0, 1).index_select(0, batch.positions), batch.labels, None, 0, 1)
