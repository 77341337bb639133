"""Cache: runs a CachePass: measures keys and values, and writes their scales.

One block is in memory at a time; all weights are copied. Nothing is rounded while it measures, so no scale depends on those of
earlier layers. The scales of a block are written and journaled at once; after a crash they are kept, and the block only runs on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial

import torch

from compress.architecture.attention import SCALES, watch_cache
from compress.checkpoint.reader import torch_dtype
from compress.contract.cache_pass import CachePass
from compress.errors import CoverageError, InputError
from compress.executors.forward_sweep import ForwardSweep
from compress.executors.step_run import StepRun
from compress.executors.stream import stream
from compress.freed_memory import trim_memory
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.meta_model import Block
from compress.layerwise.stepwise import ForwardHooks
from compress.spec.weight_state import Weight, blocks


def cache(run: StepRun) -> dict[str, float]:
    """Writes every scale that is not journaled yet. Returns the seconds of each kind of work."""
    stream(run.untouched())
    if all(run.writer.is_done(weight.name) for weight in run.touched):
        return {}
    measuring = Measuring(run)
    measuring.sweep.all_blocks(measuring.block)
    trim_memory()
    return {name: round(seconds, 3) for name, seconds in measuring.seconds.items()}


class Measuring:
    """Finds the largest magnitudes of keys and values, block by block."""

    def __init__(self, run: StepRun) -> None:
        assert isinstance(run.pass_, CachePass)
        self.run, self.pass_, self.sweep = run, run.pass_, ForwardSweep(run)
        self.scales: dict[str, dict[str, Weight]] = defaultdict(dict)
        """Module that keeps keys and values -> its two scales."""
        for weight in run.touched:
            self.scales[weight.module][weight.attribute] = weight
        self.seconds: dict[str, float] = defaultdict(float)
        self.valid: torch.Tensor | None = None
        """Which tokens of the batch that runs count, bool [samples * length]; None for all."""
        self.done = 0

    def block(self, block: Block, probe: BatchWalk, walks: list[BatchWalk], hooks: ForwardHooks) -> None:
        """Takes all batches through a block, and writes the scales inside it."""
        run, started = self.run, time.perf_counter()
        mine = {path: found for path, found in self.scales.items() if path.startswith(f"{block.path}.")}
        kept = [weight for found in mine.values() for weight in found.values() if run.writer.is_done(weight.name)]
        peaks: dict[str, list[torch.Tensor]] = {}
        watched = [
            watch_cache(self.sweep.meta_model.module_at(path), partial(self.seen, peaks, path))
            for path, found in mine.items()
            if not all(weight in kept for weight in found.values())
        ]
        for walk in walks:
            self.valid = walk.batch.valid(None, walk.arguments())
            self.sweep.on(walk)
        for handle in watched:
            handle.remove()
        self.seconds["forward"] += time.perf_counter() - started
        for path in mine if watched else ():
            self.write(path, mine[path], self.everywhere(path, peaks.get(path)))
        self.done += bool(mine)
        run.ctx.tell(
            "progress", step=run.step.name, phase="observe", weight=block.path, kept=len(kept), unit="blocks",
            done=self.done, total=blocks(run.touched),
        )  # fmt: skip

    def seen(
        self, peaks: dict[str, list[torch.Tensor]], path: str, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values [samples, heads, tokens, width] to the magnitudes of a module."""
        found = [self.peak(keys), self.peak(values)]
        peaks[path] = [torch.maximum(old, new) for old, new in zip(peaks[path], found, strict=True)] if path in peaks else found
        return keys, values

    def peak(self, x: torch.Tensor) -> torch.Tensor:
        """The largest magnitude of each head over the tokens that count, fp32 [heads]."""
        tokens = x.abs().amax(-1).transpose(0, 1).flatten(1).float()
        if self.valid is not None:
            tokens = tokens[:, self.valid]
        return tokens.amax(-1) if tokens.numel() else tokens.new_zeros(len(tokens))

    def everywhere(self, path: str, own: list[torch.Tensor] | None) -> torch.Tensor:
        """The magnitudes [2, heads] over all processes. Raises CoverageError, InputError."""
        if own is None:
            expected, got = "keys and values in a forward on texts", "none"
            raise CoverageError(path, expected, got, "leave quantize.kv out: this model keeps them in another way")
        ctx, found = self.run.ctx, torch.stack(own).cpu()
        for rank in range(ctx.world_size) if ctx.world_size > 1 else ():
            found = torch.maximum(found, ctx.broadcast(torch.stack(own).cpu(), rank))
        if not bool(torch.isfinite(found).all()):
            do = "run with --dtype float32, or on other texts"
            raise InputError(path, "keys and values that are finite", "NaN or Inf", do)
        return found

    def write(self, path: str, scales: dict[str, Weight], peaks: torch.Tensor) -> None:
        """Writes the scales of one module, each by one process, and journals them."""
        run = self.run
        for name, peak in zip(SCALES, peaks, strict=True):
            weight = scales[name]
            if run.writer.is_done(weight.name) or run.ctx.rank != sum(weight.name.encode()) % run.ctx.world_size:
                continue
            made = self.pass_.scale(peak, torch_dtype(weight.dtype))
            if made.shape != weight.shape:
                got = f"{len(peak)} heads"
                raise CoverageError(path, f"{weight.shape[0]} heads, as config.json says", got, "use granularity=tensor")
            run.writer.record(weight.name, {weight.name: run.writer.put(weight.name, made)}, {})
