"""Two streams: a sweep that runs the unchanged model beside the solved one.

Both go from block to block, and inside a block from reader to reader, side by side: a weight is solved from what it will read and
from what it would read if nothing before it had changed. So it takes two blocks in memory, and the hidden states of both.

A pass may also ask for the residual stream: for a linear whose output is added to it, how far the two streams are apart where it
is added (executors/residual_stream.py).

A routed expert has no pairs of inputs: the routers of the two models may send a token to different experts.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.architecture.experts import Routed
from compress.contract.shapes import ObservingPass
from compress.executors.residual_stream import adders
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
        assert isinstance(run.pass_, ObservingPass)
        self.corrects_residual = run.pass_.corrects_residual()
        self.adders: dict[str, str] = {}
        self.stream: str | None = None

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

    def block(self, path: str, weights: list[Weight], probe: BatchWalk) -> int:
        if not self.corrects_residual:
            return super().block(path, weights, probe)
        with self.spent("forward"):
            self.adders = adders(
                self.hooks, probe.arguments(), {key[0] for w in weights for key in self.readers(w) if not key[1]}
            )
        probe.step_back()
        undo = [hooks.keep(set(self.adders.values())) for hooks in (self.hooks, self.unchanged_hooks)]
        kept = super().block(path, weights, probe)
        for forget in undo:
            forget()
        return kept

    def linears(self, key: Key, weights: list[Weight]) -> None:
        # What is added to the stream is read by one weight alone.
        self.stream = self.adders.get(key[0]) if len(weights) == 1 else None
        forget = self.unchanged_hooks.watch({key[0]: False})
        super().linears(key, weights)
        forget()

    def statistic(self, weight: Weight) -> Any:
        made = super().statistic(weight)
        if self.stream is not None:
            made.expect_residual(weight.out_features)
        return made

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
        counted = slice(None) if valid is None else valid
        was = self.read.pop(walk)
        statistic.add_pair(rows, was.reshape(-1, was.shape[-1])[counted])
        if self.stream is not None:
            there, here = (each.kept(self.stream).flatten(0, -2)[counted] for each in (self.twins[walk], walk))
            statistic.add_residual(rows, there - here)

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
