"""Byte planes: fields of a few bits, from runs of codes, side by side in bytes.

With fields of b bits a byte has 8 / b of them: byte l of a run has the l-th field of as many runs, the first in its lowest bits.
"""

from __future__ import annotations

import torch


def joined(fields: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """uint8 fields [..., n] below 2^bits -> bytes [..., n * bits / 8]; `run` fields lie in as many bytes."""
    runs = fields.unflatten(-1, (-1, 8 // bits, run))
    found: torch.Tensor = runs[..., 0, :]
    for i in range(1, 8 // bits):
        found = found | (runs[..., i, :] << (bits * i))
    return found.flatten(-2)


def split(stored: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The inverse of `joined`."""
    runs = stored.unflatten(-1, (-1, run))
    return torch.stack([(runs >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)], dim=-2).flatten(-3)
