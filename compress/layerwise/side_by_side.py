"""Side by side: batches through several models, a block of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor

import torch

from compress.layerwise.logits import Forward
from compress.threads import workers

BATCH_TOKENS = 2048
"""Tokens in one forward: enough for efficient products, but small compared with a block's weights."""
LOGIT_BYTES = 256 << 20
"""Bytes of logits of one batch of one model; a single window may have more."""
HELD_BYTES = 1 << 30
"""Bytes of hidden states of the windows that go through the blocks together, for all models."""

Logits = tuple[torch.Tensor, list[torch.Tensor], Executor | None]
"""(ids [windows, length], their logits by each side, the threads that computed them; None for this one alone)."""


def logits_of(
    sides: Sequence[Forward], batches: Sequence[torch.Tensor], count: int, progress: Callable[[float], None]
) -> Generator[Logits]:
    """Each of `batches`, the largest first, with its logits; `count` of them go through a block at once."""
    with workers(count, torch.get_num_threads() // count) as pool:
        team = pool if count > 1 else None
        held = sum(side.held_bytes(batches[0]) for side in sides)
        together = max(1, HELD_BYTES // max(held, 1))
        for start in range(0, len(batches), together):
            group = list(batches[start : start + together])
            tell = _Share(progress, start / len(batches), len(group) / len(batches), sides)
            streams = [side.logits(group, tell.step, team) for side in sides]
            for ids in group:
                yield ids, [next(stream) for stream in streams], team
            for stream in streams:
                stream.close()
            progress((start + len(group)) / len(batches))


class _Share:
    """Reports the progress of a group of batches, counted in blocks."""

    def __init__(self, progress: Callable[[float], None], start: float, part: float, sides: Sequence[Forward]) -> None:
        self.progress, self.start = progress, start
        self.each = part / max(1, sum(len(side.meta_model.blocks) for side in sides))

    def step(self) -> None:
        self.start += self.each
        self.progress(min(1.0, self.start))
