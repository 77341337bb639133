"""GGUF super-blocks: K-quants in the blocks of 256 of their GGUF types, and back.

Legend: q, u, v, d, e as in kquants.py; fields of b bits lie side by side as in byte_planes.py, in runs of 32 or 64 codes.
    Q2_K  16 bytes u | v << 4; q by 2 bits; d; e
    Q3_K  the third bit of q; the two below it; 12 bytes for u + 32: by 4 low bits, then by 2 high ones; d
    Q4_K  d; e; 12 bytes for u and v of 6 bits; q by 4 bits
    Q5_K  d; e; 12 bytes for u and v; the fifth bit of q; the four below it
    Q6_K  the four low bits of q, in runs of 64; the two above them; u; d
The 12 bytes of Q4_K and Q5_K are of four each: u of the first four sub-blocks, v of them, and the low bits of both for the
others, whose two high bits are those above the first four's.
"""

from __future__ import annotations

import torch

from compress.numerics.byte_planes import joined, split
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import SUPER, Scheme

_SIZES = {2: (16, 64, 2, 2), 3: (32, 64, 12, 2), 4: (2, 2, 12, 128), 5: (2, 2, 12, 32, 128), 6: (128, 64, 16, 2)}
"""Bytes of the parts of a block, by bits."""


def encode(q: QTensor) -> torch.Tensor:
    """A K-quant [..., rows, columns] -> bytes [..., rows, bytes of a row]."""
    assert q.super_scale is not None
    codes = q.codes.unflatten(-1, (-1, SUPER))
    u, v = (None if part is None else part.unflatten(-1, (codes.shape[-2], -1)) for part in (q.scale, q.minimum))
    d, e = (None if part is None else _bytes(part) for part in (q.super_scale, q.super_minimum))
    assert u is not None
    unsigned = u.contiguous().view(torch.uint8)
    if q.scheme.bits == 2:
        assert v is not None
        parts = [unsigned | (v.view(torch.uint8) << 4), joined(codes, 2, 32), d, e]
    elif q.scheme.bits == 3:
        raised = unsigned + 32
        sixes = torch.cat([joined(raised & 0xF, 4, 8), joined(raised >> 4, 2, 4)], dim=-1)
        parts = [joined(codes >> 2, 1, 32), joined(codes & 3, 2, 32), sixes, d]
    elif q.scheme.bits == 6:
        parts = [joined(codes & 0xF, 4, 64), joined(codes >> 4, 2, 32), unsigned, d]
    else:
        assert v is not None
        high = [joined(codes >> 4, 1, 32)] if q.scheme.bits == 5 else []
        parts = [d, e, _pairs(unsigned, v.contiguous().view(torch.uint8)), *high, joined(codes & 0xF, 4, 32)]
    return torch.cat([part for part in parts if part is not None], dim=-1).flatten(-2)


def decode(scheme: Scheme, stored: torch.Tensor) -> QTensor:
    """The inverse of `encode`."""
    sizes = _SIZES[scheme.bits]
    parts = stored.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
    v = e = None
    if scheme.bits == 2:
        mixed, low, d, e = parts
        u, v, codes = mixed & 0xF, mixed >> 4, split(low, 2, 32)
    elif scheme.bits == 3:
        high, low, sixes, d = parts
        u = (split(sixes[..., :8], 4, 8) | (split(sixes[..., 8:], 2, 4) << 4)) - 32
        codes = split(low, 2, 32) | (split(high, 1, 32) << 2)
    elif scheme.bits == 6:
        low, high, u, d = parts
        codes = split(low, 4, 64) | (split(high, 2, 32) << 4)
    else:
        d, e, sixes, *high, low = parts
        u, v = _unpaired(sixes)
        codes = split(low, 4, 32)
        codes = codes | (split(high[0], 1, 32) << 4) if high else codes
    halves = [None if part is None else _half(part) for part in (d, e)]
    small = [None if part is None else part.flatten(-2).contiguous().view(torch.int8) for part in (u, v)]
    assert small[0] is not None
    return QTensor(
        scheme, codes.flatten(-2).contiguous(), small[0], minimum=small[1], super_scale=halves[0], super_minimum=halves[1]
    )


def _pairs(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """12 bytes for eight numbers of 6 bits and eight more."""
    firsts = [part[..., :4] | ((part[..., 4:] >> 4) << 6) for part in (u, v)]
    return torch.cat([*firsts, (u[..., 4:] & 0xF) | ((v[..., 4:] & 0xF) << 4)], dim=-1)


def _unpaired(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `_pairs`."""
    u, v, low = stored.split(4, dim=-1)
    first, second = (
        torch.cat([part & 0x3F, nibble | ((part >> 6) << 4)], dim=-1) for part, nibble in ((u, low & 0xF), (v, low >> 4))
    )
    return first, second


def _bytes(halves: torch.Tensor) -> torch.Tensor:
    """fp16 [...] as bytes [..., 2]."""
    return halves.contiguous()[..., None].view(torch.uint8)


def _half(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `_bytes`."""
    # Cloned: a dimension of one counts as contiguous whatever its stride, which may prevent the view as halves.
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16).squeeze(-1)
