"""Large pages: a packed model's weights on a CPU, in memory of such pages.

A token reads every weight once; kernels/cpu/large_pages.py tells what that is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compress.freed_memory import trim_memory
from compress.kernels.cpu.large_pages import LargePages, size_of
from compress.kernels.native.modules import PackedWeight
from compress.runtime.attention import has_kernels

_TWICE = 64 << 20
"""Bytes that are in memory twice at most, before those that were left are handed back."""


def into_large_pages(model: Any) -> int:
    """Moves packed weights, and those of linear layers that are not packed; returns how many bytes were moved."""
    # The last first, because they are taken from the end.
    places = [*_places(model)][::-1] if has_kernels(model) else []
    size = sum(size_of(tensor) for _, _, tensor in places)
    pages = LargePages.of(size)
    if pages is None:
        return 0
    moved: dict[int, torch.Tensor] = {}
    twice = 0
    while places:
        holder, name, tensor = places.pop()
        if id(tensor) not in moved:
            moved[id(tensor)] = pages.copied(tensor)
            twice += size_of(tensor)
        if isinstance(tensor, nn.Parameter):
            tensor.data = moved[id(tensor)]
        else:
            holder._buffers[name] = moved[id(tensor)]
        del tensor
        if twice > _TWICE or not places:
            trim_memory()
            twice = 0
    return size


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        held = module._buffers if isinstance(module, PackedWeight) else module._parameters if type(module) is nn.Linear else {}
        for name, tensor in held.items():
            if tensor is not None and tensor.numel() and tensor.is_contiguous():
                yield module, name, tensor
