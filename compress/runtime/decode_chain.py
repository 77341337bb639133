"""Decode chain: decoder blocks that run when the first of them is called.

That is for a token of each text. Between two blocks a forward of transformers does nothing but hand over numbers, in a dozen
calls of Python that take as long as a small block. So the first block computes the others, too, and each gives out its own
numbers when it is called with what the one before it gave. New keys and values lie in room that a cache has to spare, and
count once their block is called. A block that is called with anything else, or was changed, is computed for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn

from compress.kernels.cpu.library import DTYPES, CBlock, library
from compress.layerwise.growing_cache import GrowingLayer
from compress.runtime.attention import NAME, masks_keys
from compress.runtime.decode_block import block_of
from compress.runtime.one_token import takes_rotated


@dataclass(frozen=True)
class Ahead:
    """What blocks have computed before they were called."""

    first: int
    """The place of the first of them."""
    shared: tuple[Any, Any, Any]
    """The layers of the cache, the angles and the mask that all of them were given."""
    numbers: tuple[torch.Tensor, ...]
    """What each was given and, at the end, what the last one made of it; views of one tensor, but for the first."""
    lengths: tuple[tuple[GrowingLayer, torch.Tensor, int], ...]
    """The cache of each, its keys before, and the tokens that it then has."""

    def given_to(self, place: int, x: torch.Tensor, shared: tuple[Any, Any, Any]) -> bool:
        """Whether a block is called as it was computed, with numbers that nobody has changed since."""
        number = place - self.first
        if not 0 < number < len(self.lengths) or x is not self.numbers[number] or x._version:
            return False
        cache, keys, _ = self.lengths[number]
        return cache.keys is keys and all(one is other for one, other in zip(shared, self.shared, strict=True))

    def taken(self, place: int) -> torch.Tensor:
        """What a block makes of its token, which its cache has from now on."""
        cache, _, until = self.lengths[place - self.first]
        cache.reach(until)
        return self.numbers[place - self.first + 1]


class Chain:
    """Blocks that follow each other in a model, and what they have computed ahead."""

    def __init__(self, length: int) -> None:
        self.blocks: list[Callable[[], Any]] = [lambda: None] * length
        """References to them, which do not keep them."""
        self.ahead: Ahead | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        """Of blocks that join when they are called: only some may be copied."""
        return Chain(len(self.blocks))

    def run(self, block: Any, x: torch.Tensor, layers: Any, angles: Any, mask: torch.Tensor | None) -> torch.Tensor | None:
        """What a block makes of x [texts, 1, width], computed with those behind it; None if a module has to be called."""
        place = block.quick_place
        self.blocks[place] = ref(block)
        # In inference mode nobody can tell whether numbers were changed between two blocks.
        until = place + 1 if torch.is_inference_mode_enabled() else None
        jobs = _jobs([one() for one in self.blocks[place:until]], x, layers, mask)
        if not jobs:
            return None
        rooms = x.new_empty(len(jobs), *x.shape).unbind()
        cos, sin, angle_step = angles[0].data_ptr(), angles[1].data_ptr(), 0 if angles[0].shape[0] == 1 else angles[0].shape[-1]
        masked = (None, 0) if mask is None else (mask.data_ptr(), 0 if mask.shape[0] == 1 else mask.stride(0))
        given = x.data_ptr()
        for (job, _, _), out in zip(jobs, rooms, strict=True):
            job.x, job.cos, job.sin, job.batch, job.angles = given, cos, sin, x.shape[0], angle_step
            job.mask, job.mask_batch = masked
            job.out = given = out.data_ptr()
        library().blocks([job for job, _, _ in jobs])
        lengths = tuple((cache, cache.keys, until) for _, cache, until in jobs)
        found = Ahead(place, (layers, angles, mask), (x, *rooms), lengths)
        self.ahead = found if len(jobs) > 1 else None
        return found.taken(place)


def _jobs(
    blocks: Sequence[Any], x: torch.Tensor, layers: Any, mask: torch.Tensor | None
) -> list[tuple[CBlock, GrowingLayer, int]]:
    """The arguments of blocks up to one whose modules have to be called, their caches, and how many tokens these will have."""
    found: list[tuple[CBlock, GrowingLayer, int]] = []
    texts, config, fits = x.shape[0], blocks[0]._modules["self_attn"].config, -1
    for block in blocks:
        if block is None:
            break
        attention = block._modules["self_attn"]
        number, made = attention.layer_idx, block_of(block)
        cache = layers[number] if number < len(layers) else None
        if made is None or type(cache) is not GrowingLayer or made.dtype != DTYPES[x.dtype] or attention.config is not config:
            break
        until = cache.get_seq_length() + 1
        if mask is not None and until != fits and not masks_keys(mask, texts, until):
            break
        fits = until
        keys, values = cache.room(texts, made.groups, made.size, until, x)
        # A copy, for another thread may run the same block.
        job = CBlock.from_buffer_copy(made)
        job.keys, job.values, job.count, job.room = keys.data_ptr(), values.data_ptr(), until, keys.shape[2]
        found.append((job, cache, until))
    return found


class QuickBlock(nn.Module):
    """Mixed into x + attention(norm(x)), and to that the gated products of its norm."""

    training: bool
    quick_cache: str
    quick_chain: Chain
    quick_place: int

    def forward(self, *given: Any, **named: Any) -> Any:
        x: Any = given[0] if len(given) == 1 else named.get("hidden_states")
        held: Any = named.get(self.quick_cache)
        if x is not None and len(given) < 2 and held is not None and not self.training and not torch.is_grad_enabled():
            angles, mask = named.get("position_embeddings"), named.get("attention_mask")
            chain, place, layers = self.quick_chain, self.quick_place, held.layers
            ahead = chain.ahead
            if ahead is not None and ahead.given_to(place, x, (layers, angles, mask)):
                if place + 1 == ahead.first + len(ahead.lengths):
                    chain.ahead = None
                return ahead.taken(place)
            attention: Any = self._modules["self_attn"]
            if attention.config._attn_implementation == NAME and takes_rotated(x, angles, attention.head_dim):
                found = chain.run(self, x, layers, angles, mask)
                if found is not None:
                    return found
        return super().forward(*given, **named)


def link(blocks: Sequence[Any]) -> None:
    """Makes a chain of blocks."""
    chain = Chain(len(blocks))
    for place, block in enumerate(blocks):
        vars(block).update(quick_chain=chain, quick_place=place)
        chain.blocks[place] = ref(block)
