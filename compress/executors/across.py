"""Across: statistics over all processes, each of which has seen its own batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compress.context import Context
from compress.contract.tasks import Statistic


def add_up(ctx: Context, statistic: Statistic) -> None:
    """Sums a statistic over processes; of its `maxima`, if it has some, the largest count."""
    if ctx.world_size > 1:
        for part in (tokens := torch.tensor(statistic.tokens), *statistic.parts()):
            ctx.add_up(part)
        statistic.tokens = int(tokens)
        largest(ctx, getattr(statistic, "maxima", list)())


def largest(ctx: Context, tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each number by the largest of all processes, in place."""
    for tensor in tensors:
        own = tensor.cpu()
        for rank in range(ctx.world_size) if ctx.world_size > 1 else ():
            torch.maximum(tensor, ctx.broadcast(own, rank).to(tensor.device), out=tensor)
