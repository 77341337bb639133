"""GGUF blocks: codes and scales in the blocks of a GGUF type, and back.

A row is a run of blocks of 32. With d the block's scale and m its minimum, in fp16 unless it says otherwise:
    Q4_0   d, 16 bytes: byte j holds code j in the low nibble and code j + 16 in the high one; d * (code - 8)
    Q4_1   d, m, nibbles as in Q4_0; d * code + m
    Q5_0   d, 4 bytes: bit j is the fifth of code j; nibbles as in Q4_0 for the others; d * (code - 16)
    Q5_1   d, m, then as Q5_0; d * code + m
    Q8_0   d, 32 signed bytes; d * byte
    IQ4_NL d, nibbles as in Q4_0; d * one of 16 values (floats.py)
    MXFP4  one byte E8M0, then nibbles as in Q4_0; E2M1 codes, 2^(byte - 127) * value
    NVFP4  of 64: four bytes E4M3 for 16 codes each; byte j of 8 holds codes j and j + 8 of 16; E2M1 codes, byte * value
Groups of 64 or 128 become blocks with the same scale. K-quants are in gguf_superblocks.py. What is known of types that no scheme
has is in the package `gguf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.numerics.byte_planes import joined, split
from compress.spec.gguf_types import TYPES

if TYPE_CHECKING:
    from compress.spec.scheme import Scheme

_INTEGERS = {(4, False): "Q4_0", (5, False): "Q5_0", (8, False): "Q8_0", (4, True): "Q4_1", (5, True): "Q5_1"}
"""(bits, whether there are minima) -> type."""
_SCHEMES = {
    "Q4_0": "w4a16g32", "Q5_0": "w5a16g32", "Q8_0": "w8a16g32", "Q4_1": "w4a16g32-min", "Q5_1": "w5a16g32-min", "MXFP4": "mxfp4",
    "NVFP4": "nvfp4", "IQ4_NL": "iq4_nl", **{f"Q{bits}_K": f"q{bits}_k" for bits in range(2, 7)},
}  # fmt: skip
_RUNS = {"NVFP4": 8}
"""Codes whose nibbles lie side by side, where they are not half a block."""
_SCALES = {"MXFP4": torch.uint8, "NVFP4": torch.float8_e4m3fn}
"""Dtypes of scales other than fp16."""


def type_of(scheme: Scheme) -> str:
    """The type that holds the codes of a scheme in groups that are multiples of a block; empty if there is none."""
    if scheme.scales == "k":
        return str(scheme).upper()
    if scheme.integer and not scheme.zeros:
        return _INTEGERS.get((scheme.bits, scheme.minimum), "")
    return "IQ4_NL" if scheme.grid == "iq4" else {"e8m0": "MXFP4", "e4m3": "NVFP4"}.get(scheme.scales, "")


def scheme_text(kind: str) -> str:
    """The scheme that has the values of a type; empty if there is none."""
    return _SCHEMES.get(kind, "")


def encode(kind: str, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
    """Codes uint8 [..., rows, columns] with stored scales, and minima, [..., rows, groups] -> bytes [..., rows, bytes]."""
    blocks = codes.unflatten(-1, (-1, TYPES[kind].weights))
    count = blocks.shape[-2]
    parts = []
    for each in (scale, minimum):
        if each is not None:
            spread = each if each.shape[-1] > count else each.repeat_interleave(count // each.shape[-1], dim=-1)
            parts.append(spread.contiguous().view(torch.uint8).unflatten(-1, (count, -1)))
    if kind.startswith("Q5"):
        parts.append(joined(blocks >> 4, 1, 1))
    # Adding 128 to a byte, which wraps, takes the unsigned code to the signed one.
    body = blocks ^ 0x80 if kind == "Q8_0" else joined(blocks & 0xF, 4, _RUNS.get(kind, 16))
    return torch.cat([*parts, body], dim=-1).flatten(-2)


def decode(kind: str, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inverse of `encode`, with a scale for each block, or each part of one."""
    dtype = _SCALES.get(kind, torch.float16)
    blocks = stored.unflatten(-1, (-1, TYPES[kind].nbytes))
    high, body = 4 * kind.startswith("Q5"), TYPES[kind].weights // (1 if kind == "Q8_0" else 2)
    heads, fifths, codes = blocks.split([blocks.shape[-1] - high - body, high, body], dim=-1)
    codes = codes ^ 0x80 if kind == "Q8_0" else split(codes, 4, _RUNS.get(kind, 16))
    if high:
        codes = codes | (split(fifths, 1, 1) << 4)
    # Cloned: a dimension of one counts as contiguous whatever its stride, which may prevent the view as halves.
    numbers = [head.clone(memory_format=torch.contiguous_format).view(dtype) for head in heads.chunk(1 + kind.endswith("_1"), -1)]
    scale, *minimum = (part.flatten(-2) for part in numbers)
    return codes.flatten(-2).contiguous(), scale, minimum[0] if minimum else None
