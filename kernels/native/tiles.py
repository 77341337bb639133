"""Tiles: the order of codes in the native layout, 16 rows by 64 bytes at a time.

Legend: N rows, K columns, b bits; T = ceil(N / 16) tiles of rows, C = ceil(K / KC) chunks of KC = 32 * 16 / b' columns, where
b' is b, or 2 for codes of 3 bits and 4 for codes of 5 and 6; p one of the 16 / b' planes of a word, r one of its 32 words.

    words int16 [experts?, T, C, 16, 32]    bits b'p .. b'p + b' - 1 of words[n // 16, c, n % 16, r] are code [n, c KC + 32p + r]

Codes of 3 bits have their two low bits there, and their high bits in 16 more words of the same row, [..., 16, 48]: that of
column c KC + 32p + r is bit BIT[r % 8 // 2 % 2][p // 4][p % 4] of word 32 + 4 (r // 8) + 2 (r % 8 // 4) + r % 2. So a lane that
owns the words 8t .. 8t + 7 also owns their high bits, at positions from which one mask moves them next to the low bits.

Codes of 5 and 6 bits have their four low bits there, and the h others in 8 h more words of the same row: those of column
c KC + 32p + r are h bits up from bit 4h (r % i) + h p of word 32 + r // i, with i = 4 / h columns of a plane to a word.

A plane is a run of 32 neighbouring columns, which multiplies a plain slice of activations; a chunk of 16 rows is a contiguous
KiB; rows and columns can be split at tiles and chunks. Padding beyond N and K is zero bits: kernels read zeros for activations
beyond K, and drop rows beyond N.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import pad

ROWS, WORDS = 16, 32
BIT = (((2, 4, 6, 8), (3, 5, 7, 9)), ((10, 12, 14, 0), (11, 13, 15, 1)))
_CHUNK = 1 << 20
"""Codes processed at a time."""


def chunk(bits: int) -> int:
    """Columns of a chunk."""
    return WORDS * 16 // low_bits(bits)


def words(bits: int) -> int:
    """Words of a row of a chunk."""
    return WORDS + {3: 16, 5: 8, 6: 16}.get(bits, 0)


def shape(rows: int, columns: int, bits: int) -> tuple[int, int, int, int]:
    """Tiles of rows, chunks, rows of a tile, words: the shape of a matrix's words."""
    return -(-rows // ROWS), -(-columns // chunk(bits)), ROWS, words(bits)


def low_bits(bits: int) -> int:
    return {3: 2, 5: 4, 6: 4}.get(bits, bits)


@lru_cache(maxsize=1)
def _high() -> torch.Tensor:
    """The column of a chunk whose high bit is bit j of high word w: int64 [16, 16]."""
    columns = torch.empty(16, 16, dtype=torch.int64)
    for k in range(chunk(3)):
        p, r = divmod(k, WORDS)
        columns[4 * (r // 8) + 2 * (r % 8 // 4) + r % 2, BIT[r % 8 // 2 % 2][p // 4][p % 4]] = k
    return columns


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [experts?, N, K] -> words."""
    rows, columns = codes.shape[-2:]
    out = torch.empty(*codes.shape[:-2], *shape(rows, columns, bits), dtype=torch.int16, device=codes.device)
    step = ROWS * max(1, _CHUNK // (ROWS * columns))
    flat = out.view(-1, *out.shape[-4:])
    for matrix, tiles in zip(codes.reshape(-1, rows, columns), flat, strict=True):
        for start in range(0, rows, step):
            part = matrix[start : start + step]
            part = pad(part, (0, -columns % chunk(bits), 0, -len(part) % ROWS)).unflatten(1, (-1, chunk(bits)))
            tiles[start // ROWS : (start + step) // ROWS] = _join(part, bits).unflatten(0, (-1, ROWS)).transpose(1, 2)
    return out


def unpack(tiles: torch.Tensor, bits: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`."""
    codes = torch.empty(*tiles.shape[:-4], rows, columns, dtype=torch.uint8, device=tiles.device)
    step = ROWS * max(1, _CHUNK // (ROWS * columns))
    for part, matrix in zip(tiles.reshape(-1, *tiles.shape[-4:]), codes.view(-1, rows, columns), strict=True):
        for start in range(0, rows, step):
            found = split(by_rows(part, slice(start, min(rows, start + step))), bits)
            matrix[start : start + step] = found.flatten(1)[:, :columns]
    return codes


def by_rows(tiled: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """Some rows [n, c, ...] of tiles [T, c, 16, ...]. A slice must begin at a tile; an index is int64 [n]."""
    if isinstance(rows, slice):
        held = tiled[rows.start // ROWS : -(-rows.stop // ROWS)].transpose(1, 2).flatten(0, 1)
        return held[: rows.stop - rows.start]
    return tiled[rows // ROWS, :, rows % ROWS]


def _join(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, C, KC] -> words int16 [n, C, 32 to 48]."""
    low, wide = low_bits(bits), codes.to(torch.int32)
    planes = (wide & ((1 << low) - 1)).unflatten(-1, (-1, WORDS))
    joined = planes[..., 0, :].clone()
    for p in range(1, 16 // low):
        joined |= planes[..., p, :] << (low * p)
    if bits == 3:
        joined = torch.cat([joined, ((wide >> 2)[..., _high()] << torch.arange(16)).sum(-1, dtype=torch.int32)], -1)
    if low < bits and bits != 3:
        upper, high = bits - low, (wide >> low).unflatten(-1, (-1, WORDS))
        columns = sum(high[..., p, :] << (upper * p) for p in range(4)).unflatten(-1, (-1, 4 // upper))
        joined = torch.cat([joined, sum(columns[..., i] << (4 * upper * i) for i in range(4 // upper))], -1)
    found: torch.Tensor = joined.to(torch.int16)
    return found


def split(found: torch.Tensor, bits: int) -> torch.Tensor:
    """Words int16 [..., 32 to 48] -> uint8 codes [..., KC]."""
    low = low_bits(bits)
    planes = [(found[..., :WORDS] >> (low * p)) & ((1 << low) - 1) for p in range(16 // low)]
    if bits == 3:
        r = torch.arange(WORDS, device=found.device)
        high = found[..., WORDS + 4 * (r // 8) + 2 * (r % 8 // 4) + r % 2]
        at = torch.tensor(BIT, dtype=torch.int16, device=found.device)[r % 8 // 2 % 2].flatten(1)
        planes = [plane | ((high >> at[:, p]) & 1) << 2 for p, plane in enumerate(planes)]
    elif low < bits:
        upper, r = bits - low, torch.arange(WORDS, dtype=torch.int16, device=found.device)
        high = found[..., WORDS + (r // (4 // upper)).long()] >> (4 * upper * (r % (4 // upper)))
        planes = [plane | ((high >> (upper * p)) & ((1 << upper) - 1)) << low for p, plane in enumerate(planes)]
    return torch.cat([plane.to(torch.uint8) for plane in planes], -1)


def pack_grid(grid: torch.Tensor, groups: int) -> torch.Tensor:
    """Scales or zero points [experts?, N, g] -> [experts?, T, groups, 16], padded with zero bytes."""
    rows, held = grid.shape[-2:]
    full = torch.zeros(*grid.shape[:-2], -(-rows // ROWS) * ROWS, groups, dtype=torch.uint8 if grid.itemsize == 1 else grid.dtype)
    full[..., :rows, :held] = grid.view(full.dtype)
    tiled: torch.Tensor = full.unflatten(-2, (-1, ROWS)).transpose(-1, -2).contiguous()
    return tiled.view(grid.dtype)


def unpack_grid(tiled: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `pack_grid`."""
    held = tiled.transpose(-1, -2).flatten(-3, -2)[..., :rows, :groups]
    # Cloned: a single group counts as contiguous whatever its strides, which may prevent the view as bytes.
    return held.clone(memory_format=torch.contiguous_format)
