"""GGUF blocks: codes and scales in the blocks of a GGUF type, and back.

A row is a run of blocks. With d the block's scale, in fp16 unless it says otherwise, and elements 0 .. 31 of a block:
    Q4_0   d, 16 bytes: byte j holds code j in the low nibble and code j + 16 in the high one; d * (code - 8)
    Q8_0   d, 32 signed bytes; d * byte
    MXFP4  one byte E8M0, then nibbles as in Q4_0; E2M1 codes, 2^(byte - 127) * value
Groups of 64 or 128 become blocks with the same scale. What is known of types that no scheme has is in the package `gguf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.spec.gguf_types import BLOCK

if TYPE_CHECKING:
    from compress.spec.scheme import Scheme


def type_of(scheme: Scheme) -> str:
    """The type that holds the codes of a scheme in groups that are multiples of a block; empty if there is none."""
    if scheme.integer and scheme.symmetric:
        return {4: "Q4_0", 8: "Q8_0"}.get(scheme.bits, "")
    return "MXFP4" if scheme.scales == "e8m0" else ""


def scheme_text(kind: str) -> str:
    """The scheme that has the values of a type; empty if there is none."""
    return {"Q4_0": "w4a16g32", "Q8_0": "w8a16g32", "MXFP4": "mxfp4"}.get(kind, "")


def encode(kind: str, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., rows, columns] with scales [..., rows, groups], fp16 or the bytes of E8M0 -> bytes [..., rows, bytes]."""
    blocks = codes.unflatten(-1, (-1, BLOCK))
    repeats = blocks.shape[-2] // scale.shape[-1]
    heads = scale.repeat_interleave(repeats, dim=-1).contiguous().view(torch.uint8).unflatten(-1, (blocks.shape[-2], -1))
    # Adding 128 to a byte, which wraps, takes the unsigned code to the signed one.
    body = blocks ^ 0x80 if kind == "Q8_0" else blocks[..., : BLOCK // 2] | (blocks[..., BLOCK // 2 :] << 4)
    return torch.cat([heads, body], dim=-1).flatten(-2)


def decode(kind: str, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `encode`, with a scale for each block."""
    head, body_bytes = (1 if kind == "MXFP4" else 2), (32 if kind == "Q8_0" else 16)
    blocks = stored.unflatten(-1, (-1, head + body_bytes))
    # Cloned: a dimension of one counts as contiguous whatever its stride, which may prevent the view as halves.
    scale, body = blocks[..., :head].clone(memory_format=torch.contiguous_format), blocks[..., head:]
    codes = body ^ 0x80 if kind == "Q8_0" else torch.cat([body & 0xF, body >> 4], dim=-1)
    scale = scale.squeeze(-1) if kind == "MXFP4" else scale.view(torch.float16).squeeze(-1)
    return codes.flatten(-2).contiguous(), scale.contiguous()
