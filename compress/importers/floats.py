"""Small floats of other tools: pairs of E2M1, E2M3, E8M0, scales over blocks."""

from __future__ import annotations

import torch

from compress.numerics.bitstream import unpack
from compress.numerics.floats import decode
from compress.spec.scheme import Scheme

_E2M1 = Scheme.parse("mxfp4")

_E2M3_MAGNITUDES = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
E2M3 = (*_E2M3_MAGNITUDES, *(-m for m in _E2M3_MAGNITUDES))
"""The value of each 6-bit code: sign, two bits of exponent, three of mantissa."""


def pairs(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] -> fp32 E2M1 values [..., 2 n], the low nibble first."""
    index = packed.contiguous().view(torch.uint8)
    return decode(unpack(index, 4, 2 * index.shape[-1]), _E2M1)


def e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """2^(u - 127) in fp32 from bytes u; 255 becomes infinity, as in compressed-tensors and transformers."""
    bits = exponents.view(torch.uint8).to(torch.int32)
    powers = (bits << 23).view(torch.float32)
    # 2^-127 is subnormal in fp32, so the exponent field alone cannot express it.
    return torch.where(bits == 0, torch.tensor(2.0**-127), powers)


def spread(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """Scales [blocks down, blocks along] expanded to [rows, columns]; last blocks may be cut short."""
    return scale.repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
