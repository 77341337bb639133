"""Rotate inputs: as codes of W R want them; few tokens by a kernel of ours."""

from __future__ import annotations

from functools import lru_cache

import torch

from compress.errors import Refusal
from compress.kernels.cpu.library import DTYPES, Library, library
from compress.kernels.native.op import needs_operator
from compress.numerics.input_rotation import rotated

MOST = 1 << 16
"""Numbers up to which one thread is faster than torch's many."""


def mixed(x: torch.Tensor, n: int) -> torch.Tensor:
    """`rotated`, up to the order in which numbers are added up."""
    plain = n > 0 and not needs_operator(x, None) and x.device.type == "cpu" and x.dtype in DTYPES and x.is_contiguous()
    if plain and 0 < x.numel() <= MOST and (kernels := _kernels()) is not None:
        return kernels.mix(x, n)
    return rotated(x, n)


@lru_cache(maxsize=1)
def _kernels() -> Library | None:
    try:
        return library()
    except Refusal:
        return None
