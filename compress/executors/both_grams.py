"""Both Grams: sums of x x^T of inputs and of g g^T by outputs, block by block.

The sweep of output_grams.py, which runs every block again anyway: what its weights read is added up on the way. Weights that
read one tensor share a sum. Nothing is kept: each weight is handed on with its sums as soon as its block is through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compress.device import made_on
from compress.executors.across import add_up
from compress.executors.backward_batch import BackwardBatch
from compress.executors.output_grams import OutputSweep
from compress.layerwise.batches import Batch
from compress.layerwise.meta_model import Block
from compress.numerics.hessian import Hessian
from compress.numerics.output_feedback import OutputGrams
from compress.spec.weight_state import Weight

TakeBoth = Callable[[Weight, Any, list[torch.Tensor]], None]
"""Receives a weight, what is prepared of its inputs, and means over tokens of g g^T for each segment of its rows."""


class BothSweep(OutputSweep):
    """Hands over what weights read as well; g is the gradient of a token's own loss."""

    def run_both(self, batches: list[Batch], prepare: Callable[[Hessian], Any], take: TakeBoth) -> float:
        """As `run`; `prepare` is called once for each tensor that weights read. Returns the loss."""
        self._readers: dict[str, str] = {}

        def both(weight: Weight, grams: Any) -> None:
            owner = self._readers[weight.name]
            if owner not in self._ready:
                self._ready[owner] = prepare(self._inputs.pop(owner))
            # Gradients are those of a mean over all scored tokens.
            take(weight, self._ready[owner], [gram * self.total**2 for gram in grams])

        return self.run(batches, both)

    def _watched(self, mine: list[Weight], walks: list[BackwardBatch], block: Block, step: int) -> dict[str, OutputGrams]:
        self._inputs: dict[str, Hessian] = {}
        self._ready: dict[str, Any] = {}
        hooks = [
            self.meta_model.module_at(path).register_forward_pre_hook(self._reads(weight))
            for weight in mine
            for path in self.meta_model.readers(weight.name)
        ]
        held = super()._watched(mine, walks, block, step)
        for hook in hooks:
            hook.remove()
        for statistic in self._inputs.values():
            add_up(self.ctx, statistic)
        return held

    def _go_back(self, walk: BackwardBatch, block: Block, step: int) -> None:
        self._mask, self._seen = walk.batch.mask, dict[Any, tuple[str, torch.Tensor]]()
        super()._go_back(walk, block, step)
        self._seen.clear()

    def _reads(self, weight: Weight) -> Callable[..., None]:
        """A hook that adds what a weight reads to the sum of the first weight that reads the same tensor."""

        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            if not torch.is_grad_enabled():
                return
            x = given[0].detach()
            # What is held is not freed, so that no other tensor gets its address.
            owner, _held = self._seen.setdefault((x.data_ptr(), x.shape, x._version), (weight.name, x))
            self._readers[weight.name] = owner
            if owner != weight.name:
                return
            rows = x.reshape(-1, x.shape[-1])
            if self._mask is not None and self._mask.numel() == len(rows):
                rows = rows[self._mask.reshape(-1).bool()]
            if owner not in self._inputs:
                self._inputs[owner] = made_on(self.meta_model.device, Hessian, x.shape[-1])
            self._inputs[owner].add(rows)

        return hook
