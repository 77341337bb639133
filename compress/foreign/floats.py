"""Small floats: E2M1 and E2M3 values, E8M0 scales, and scales spread over blocks."""

from __future__ import annotations

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each 4-bit code: sign, two bits of exponent, one of mantissa."""
_E2M3_MAGNITUDES = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
E2M3 = (*_E2M3_MAGNITUDES, *(-m for m in _E2M3_MAGNITUDES))
"""The value of each 6-bit code: sign, two bits of exponent, three of mantissa."""


def pairs(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] -> fp32 E2M1 values [..., 2 n], the low nibble first."""
    values = torch.tensor(E2M1)
    index = packed.contiguous().view(torch.uint8)
    both = torch.stack([values[(index & 0xF).int()], values[(index >> 4).int()]], dim=-1)
    return both.flatten(-2)


def e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """2^(u - 127) in fp32 from bytes u; 255 becomes infinity, as compressed-tensors and transformers have it."""
    bits = exponents.view(torch.uint8).to(torch.int32)
    powers = (bits << 23).view(torch.float32)
    # The smallest is below fp32's normal range, where the exponent's field alone does not say it.
    return torch.where(bits == 0, torch.tensor(2.0**-127), powers)


def spread(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """Scales [blocks down, blocks along] at every entry of [rows, columns]; last blocks may be cut short."""
    return scale.repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
