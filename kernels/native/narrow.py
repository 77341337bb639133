"""Narrow: no padding of the last chunk of columns on disk, only in memory.

If chunks do not divide the columns, and there is more than one, the last chunk is not in NAME.tiles. Its columns are
    NAME.rest    uint8 [experts?, rows, bytes]   code j of a row at bits b j up, rows of whole 32-bit words, as in bitstream.py
and the grids of scales, zero points and minima end with the groups of the real columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.kernels.native import tiles
from compress.kernels.native.packed import GRIDS, by_row, groups_of
from compress.numerics import bitstream
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import Scheme


def rest(columns: int, bits: int) -> int:
    """Columns of the last chunk if it is cut off, else 0."""
    chunk = tiles.chunk(bits)
    return columns % chunk if columns > chunk else 0


def cut(parts: Mapping[str, torch.Tensor], q: QTensor) -> dict[str, torch.Tensor]:
    """The parts of a packed QTensor in their form on disk."""
    scheme, columns = q.scheme, q.codes.shape[-1]
    codes = bitstream.pack(q.codes[..., -rest(columns, scheme.bits) :], scheme.bits)
    found = {"tiles": parts["tiles"][..., :-1, :, :].contiguous(), "rest": codes.contiguous()}
    for name in GRIDS if by_row(scheme) else ():
        if name in parts:
            found[name] = parts[name][..., : scheme.groups(columns), :].clone(memory_format=torch.contiguous_format)
    return {**{name: part for name, part in parts.items() if name != "tiles"}, **found}


def whole(parts: Mapping[str, torch.Tensor], scheme: Scheme, columns: int) -> dict[str, torch.Tensor]:
    """The inverse of `cut`: columns are padded with zeros again. Returns parts without a rest unchanged."""
    if "rest" not in parts:
        return dict(parts)
    last = tiles.pack(bitstream.unpack(parts["rest"], scheme.bits, rest(columns, scheme.bits)), scheme.bits)
    found = {"tiles": torch.cat([parts["tiles"], last], -3)}
    for name in GRIDS if by_row(scheme) else ():
        if name in parts:
            found[name] = _padded(parts[name], groups_of(scheme, columns))
    return {**{name: part for name, part in parts.items() if name not in ("tiles", "rest")}, **found}


def _padded(grid: torch.Tensor, groups: int) -> torch.Tensor:
    """A grid [..., g, 16] with zero bytes where there is no group."""
    plain = grid.view(torch.uint8) if grid.itemsize == 1 else grid
    full = plain.new_zeros(*grid.shape[:-2], groups, grid.shape[-1])
    full[..., : grid.shape[-2], :] = plain
    return full.view(grid.dtype)
