"""Growing cache: keys and values in memory that has room for more tokens.

transformers' default cache joins old and new tensors at every token, which on a CPU takes longer than to attend to them. Here a
layer is copied once in many tokens, and what attention reads is a view. Sliding windows and other kinds of layers stay as
transformers has them.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 256
"""The least tokens that there is room for when a layer is copied; or a quarter of those that it has."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [batch, heads, tokens, size], views of tensors that are longer."""

    keys: torch.Tensor
    values: torch.Tensor
    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None
    _views: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *more: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values; returns all of them."""
        if key_states.requires_grad or value_states.requires_grad:
            found: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *more, **options)
            return found
        texts, groups, tokens, size = key_states.shape
        had = self.get_seq_length()
        until = had + tokens
        key_room, value_room = self.room(texts, groups, size, until, key_states, value_states.shape[-1])
        key_room[..., had:until, :], value_room[..., had:until, :] = key_states, value_states
        self.reach(until)
        return self.keys, self.values

    def room(
        self, texts: int, groups: int, size: int, until: int, like: torch.Tensor, values: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors [texts, groups, tokens, size] with room for `until` tokens, that begin with those there are."""
        if not self.is_initialized:
            empty = like.new_empty(texts, groups, 0, size)
            self.lazy_initialization(empty, empty)
        had = self.get_seq_length()
        if self._rooms is None or not had or until > self._rooms[0].shape[-2] or not self._is_here():
            most = until + max(ROOM, until // 4)
            self._rooms = like.new_empty(texts, groups, most, size), like.new_empty(texts, groups, most, values or size)
            if had:
                for room, held in zip(self._rooms, (self.keys, self.values), strict=True):
                    room[..., :had, :] = held
                self.reach(had)
        return self._rooms

    def reach(self, until: int) -> None:
        """So many tokens count from now on."""
        assert self._rooms is not None
        keys, values = self._rooms
        self.keys, self.values = keys[..., :until, :], values[..., :until, :]
        self._views = self.keys, self.values

    def _is_here(self) -> bool:
        """Whether keys and values are still views: beams and batches that are chosen from are tensors of their own."""
        assert self._rooms is not None
        if self.keys is self._views[0] and self.values is self._views[1]:
            return True
        held = zip((self.keys, self.values), self._rooms, strict=True)
        return all(one.data_ptr() == room.data_ptr() and one.shape[:-2] == room.shape[:-2] for one, room in held)

    def reset(self) -> None:
        self._rooms = None
        super().reset()


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """A cache for a model of `config`, to give to `generate` or to forwards. It takes up to a quarter more memory."""

    layers: list[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def argument(model: Any) -> str:
    """The name by which `generate` and forwards of a model take a cache, in this release of transformers."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
