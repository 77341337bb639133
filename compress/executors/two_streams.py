"""Two streams: a sweep that runs the unchanged model beside the solved one.

Both go from block to block, and inside a block from reader to reader, side by side: a weight is solved from what it will read and
from what it would read if nothing before it had changed. So it takes two blocks in memory, and the hidden states of both.

A routed expert has no pairs of inputs: the routers of the two models may send a token to different experts.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.architecture.experts import Routed
from compress.executors.step_run import StepRun
from compress.executors.sweep import Sweep, model_of
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.batches import Batch
from compress.layerwise.hidden_state_offload import HiddenStateOffload
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.stepwise import ForwardHooks, Key
from compress.spec.weight_state import Weight


class TwoStreamSweep(Sweep):
    """A Sweep whose statistics get the inputs of the unchanged model as well: `add_pair(x, as it was)`."""

    def __init__(self, run: StepRun, meta_model: MetaModel, hooks: ForwardHooks, batches: list[Batch]) -> None:
        super().__init__(run, meta_model, hooks, batches)
        self.unchanged = model_of(run)
        self.unchanged_hooks = ForwardHooks(self.unchanged)
        self.twins: dict[BatchWalk, BatchWalk] = {}
        self.read: dict[BatchWalk, Any] = {}

    def all_blocks(self, weights: list[Weight]) -> None:
        with self.unchanged_hooks:
            super().all_blocks(weights)

    def set_out(self, probe: BatchWalk, offload: HiddenStateOffload) -> None:
        super().set_out(probe, offload)
        self.twins = {walk: BatchWalk(walk.batch, self.unchanged_hooks, offload) for walk in self.walks}
        with self.spent("unchanged forward"):
            for twin in self.twins.values():
                twin.set_out()

    def load(self, path: str) -> None:
        super().load(path)
        self.unchanged.release_visitors()
        with self.spent("load"):
            self.unchanged.load(path)

    def linears(self, key: Key, weights: list[Weight]) -> None:
        forget = self.unchanged_hooks.watch({key[0]: False})
        super().linears(key, weights)
        forget()

    def until(self, walk: BatchWalk, key: Key) -> torch.Tensor | Routed:
        found = super().until(walk, key)
        if not key[1]:
            with self.spent("unchanged forward"):
                self.read[walk] = self.twins[walk].until(key)
        return found

    def step_back(self, walk: BatchWalk) -> None:
        super().step_back(walk)
        self.twins[walk].step_back()

    def add(self, statistic: Any, walk: BatchWalk, rows: torch.Tensor, valid: torch.Tensor | None) -> None:
        was = self.read.pop(walk)
        was = was.reshape(-1, was.shape[-1])
        statistic.add_pair(rows, was if valid is None else was[valid])

    def go_on(self, probe: BatchWalk, path: str) -> None:
        super().go_on(probe, path)
        with self.spent("unchanged forward"):
            for twin in self.twins.values():
                twin.go_on()
        self.unchanged.release(path)

    def leave(self, probe: BatchWalk) -> None:
        super().leave(probe)
        for twin in self.twins.values():
            twin.leave()
