"""Forward sweep: takes all batches through a model, a block in memory at a time.

Nothing is replaced on the way: what is observed is the model of the source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint.reader import Checkpoint
from compress.context import Context
from compress.device import device_of
from compress.errors import CoverageError
from compress.executors.step_run import StepRun
from compress.freed_memory import trim_memory
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.batches import cut
from compress.layerwise.dense_view import DenseView
from compress.layerwise.hidden_state_offload import HiddenStateOffload
from compress.layerwise.input_rounding import round_as_told
from compress.layerwise.memory_estimate import BETWEEN_BYTES, computing
from compress.layerwise.meta_model import Block, MetaModel
from compress.layerwise.stepwise import Call, ForwardHooks

AtBlock = Callable[[Block, BatchWalk, list[BatchWalk], ForwardHooks], None]
"""(block, which is loaded; a walk of one sample; the walks of all batches, which it must take on by `on`; hooks)."""


class ForwardSweep:
    """The model of a step's source, and this process's batches of the tokens that the step reads."""

    def __init__(self, run: StepRun) -> None:
        self.source: Checkpoint = run.source
        self.ctx: Context = run.ctx
        self.folder: Path = run.writer.path
        device = device_of(run.ctx)
        dtype = computing(run.ctx.dtype, run.source.config, device)
        self.meta_model = round_as_told(MetaModel(DenseView(run.source), dtype, device))
        made = self.meta_model
        self.batches = cut(run.corpus().tensors, made.module, run.ctx.rank, run.ctx.world_size, made.dtype, device)

        self.last = False

    def on(self, walk: BatchWalk, seen: Callable[[Call, Any], None] | None = None) -> None:
        """Takes a batch through the block, and to the next one; `seen` gets the block's call and output."""
        # Nobody asks for logits after the last block, and they are larger than all else.
        walk.go_on(seen, last=self.last)

    @torch.no_grad()
    def all_blocks(self, at: AtBlock) -> None:
        """Calls `at` for each block, in order. Raises CoverageError for a model that runs a block twice."""
        offload = HiddenStateOffload(self.folder, self.ctx.rank, BETWEEN_BYTES, self.meta_model.device)
        offload.clear()
        with ForwardHooks(self.meta_model) as hooks:
            probe = BatchWalk(self.batches[0].first(), hooks, offload)
            walks = [BatchWalk(batch, hooks, offload) for batch in self.batches]
            for walk in (probe, *walks):
                walk.set_out()
            seen: set[str] = set()
            while probe.call is not None:
                block = probe.call.block
                if block.path in seen:
                    expected, got = "each block once in a forward", "a block that runs again"
                    raise CoverageError(block.path, expected, got, "use a pass without data")
                seen.add(block.path)
                self.meta_model.release_visitors()
                self.meta_model.load(block.path)
                self.last = block == self.meta_model.blocks[-1]
                at(block, probe, walks, hooks)
                probe.go_on(last=self.last)
                self.meta_model.release(block.path)
                trim_memory()
            for walk in (probe, *walks):
                walk.leave()
        offload.clear()
        self.meta_model.release_visitors()
