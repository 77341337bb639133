"""Bit streams: codes of b bits in sequence, lowest bit first.

One rule for every width: value i of a row lies at bits [i*b, i*b + b) of the row's little-endian stream, and a
row is padded with zero bits to whole 32-bit words. GPTQ and compressed-tensors use the same order,
so codes move between formats as bytes. The oracle in the tests is Python's own big integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_CHUNK = 1 << 20
"""Bytes that are packed or unpacked at a time; what lies between takes several times as many, and malloc keeps some of it."""


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row, padded to whole 32-bit words."""
    return math.ceil(columns * bits / 32) * 4


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes `[..., columns]` in 0 .. 2^bits - 1 -> uint8 stream `[..., row_bytes]`."""
    if codes.numel() <= _CHUNK or bits == 8:
        return _pack(codes, bits)
    return _by_rows(codes, row_bytes(codes.shape[-1], bits), lambda rows: _pack(rows, bits))


def unpack(stream: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """uint8 stream `[..., row_bytes]` -> uint8 codes `[..., columns]`."""
    if stream.numel() <= _CHUNK or bits == 8:
        return _unpack(stream, bits, columns)
    return _by_rows(stream, columns, lambda rows: _unpack(rows, bits, columns))


def _by_rows(x: torch.Tensor, width: int, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """uint8 `[..., n]` -> uint8 `[..., width]`, some rows at a time: what lies between takes several times the bytes of both."""
    rows = x.reshape(-1, x.shape[-1])
    made = torch.empty(len(rows), width, dtype=torch.uint8, device=x.device)
    step = max(1, _CHUNK // max(1, x.shape[-1]))
    for start in range(0, len(rows), step):
        made[start : start + step] = work(rows[start : start + step])
    return made.view(*x.shape[:-1], width)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    columns = codes.shape[-1]
    padded = row_bytes(columns, bits) * 8 // bits if bits in (2, 4, 8) else math.ceil(columns / 32) * 32
    if padded != columns:
        codes = torch.nn.functional.pad(codes, (0, padded - columns))
    codes = codes.contiguous()
    if bits == 8:
        # A dimension of one may have any stride; this gives contiguous strides, which callers need to view words.
        return codes.reshape(-1).reshape(codes.shape)
    if bits in (5, 6):
        words = _joined([codes[..., i::8] for i in range(8)], bits)
        stream: torch.Tensor = words.view(torch.uint8).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)
        return stream[..., : row_bytes(columns, bits)].contiguous()
    # Neighbours are joined pairwise through a view twice as wide: (low | high << w) folds to (low | high << used).
    pairs = codes.view(torch.int16)
    joined = (pairs | (pairs >> (8 - bits))).to(torch.uint8).view(torch.int16)
    if bits == 4:
        return joined.view(torch.uint8)
    if bits == 2:
        return (joined | (joined >> 4)).to(torch.uint8)
    # Three bits: 12 of each 16 are used, then 24 of each 32, which are three whole bytes.
    fours = ((joined & 0x3F) | ((joined >> 2) & 0xFC0)).view(torch.int32)
    eights = (fours & 0xFFF) | ((fours >> 4) & 0xFFF000)
    stream = eights.view(torch.uint8).reshape(*codes.shape[:-1], -1, 4)[..., :3].flatten(-2)
    return stream[..., : row_bytes(columns, bits)].contiguous()


def _unpack(stream: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    if bits == 8:
        return stream[..., :columns].contiguous()
    if bits in (2, 4):
        mask = (1 << bits) - 1
        parts = [(stream >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :columns].contiguous()
    # Eight codes fill as many bytes as a code has bits.
    whole = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % bits))
    words = _joined([whole[..., i::bits] for i in range(bits)], 8)
    parts = [((words >> (bits * i)) & ((1 << bits) - 1)).to(torch.uint8) for i in range(8)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :columns].contiguous()


def _joined(parts: list[torch.Tensor], bits: int) -> torch.Tensor:
    """int64 words of uint8 parts, the first in the lowest bits, each `bits` above the one before."""
    words = parts[0].to(torch.int64)
    for i, part in enumerate(parts[1:], 1):
        words |= part.to(torch.int64) << (bits * i)
    return words
