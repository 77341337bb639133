"""Small floats and code books: values of codes, and rounding to the nearest one.

Legend: b bits, S sign, E exponent, M mantissa. Codes, from the highest bit down:
    e2m1  S EE M       0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; no NaN, no infinity
    e3m0  S EEE        0, .25, .5, 1, 2, 4, 8, 16 and their negatives (ZeroQuant-FP, 2307.09782)
    e4m3  S EEEE MMM   the byte of float8_e4m3fn, largest 448; NaN, no infinity
    e5m2  S EEEEE MM   the byte of float8_e5m2, largest 57344
    nf    the index among 2^b ascending values from -1 to 1, with 0 among them: quantiles of a Gaussian, which
          for 4 bits are the table of bitsandbytes (QLoRA, 2305.14314), else LoftQ's create_normal_map (2310.08659)
    iq4   the index among 16 ascending whole numbers, llama.cpp's for IQ4_NL; none of them is zero
Rounding is to the nearest value, at a tie to the even code (in nf and iq4 to the lower), and beyond the largest value to the
largest. Zero has a sign in all but these. Only e4m3 and e5m2 have a code for NaN: in the others the scale must express it.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import torch

from compress.spec.scheme import Scheme

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E3M0 = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_TABLES = ("nf", "iq4")
"""Grids whose codes are indices in an ascending table."""
_BYTES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_MAGNITUDES = {"e2m1": E2M1, "e3m0": E3M0}
_OFFSET = 0.9677083
"""The outermost quantile of an nf grid."""


def normal_map(bits: int) -> tuple[float, ...]:
    """The 2^bits values of an nf grid, ascending."""
    if bits == 4:
        return NF4
    half = 1 << (bits - 1)

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(_OFFSET + (0.5 - _OFFSET) * i / count) for i in range(count)]

    largest = quantiles(1)[0]
    return (*(-x / largest for x in quantiles(half - 1)), 0.0, *(x / largest for x in reversed(quantiles(half))))


def top(scheme: Scheme) -> float:
    """The largest value of a grid, to which the largest weight of a group is scaled."""
    if scheme.grid in _BYTES:
        return torch.finfo(_BYTES[scheme.grid]).max
    return _MAGNITUDES[scheme.grid][-1] if scheme.grid in _MAGNITUDES else -IQ4[0] if scheme.grid == "iq4" else 1.0


@lru_cache(maxsize=64)
def _tables(grid: str, bits: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(values by code, bounds between codes: a number, or its magnitude, above one gets the next code); cached by device."""
    values, bounds = _made(grid, bits, dtype)
    return values.to(device), bounds.to(device)


def _made(grid: str, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if grid in _TABLES:
        values = torch.tensor(normal_map(bits) if grid == "nf" else IQ4, dtype=torch.float32).to(dtype)
        return values, (values[1:] + values[:-1]) / 2
    values = torch.tensor(_MAGNITUDES[grid], dtype=dtype)
    bounds = (values[1:] + values[:-1]) / 2
    # A tie between an odd code and the next one goes up, to the even code.
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros((), dtype=dtype))
    return torch.cat([values, -values]), bounds


def encode(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """uint8 codes of the grid values nearest to `x`, which is a weight over its scale, fp32 or fp64."""
    if scheme.grid in _BYTES:
        largest = top(scheme)
        # Clamped first: the cast of larger numbers depends on the format and on torch's version.
        return x.clamp(-largest, largest).float().to(_BYTES[scheme.grid]).view(torch.uint8)
    bounds, x = _tables(scheme.grid, scheme.bits, x.dtype, x.device)[1], x.contiguous()
    if scheme.grid in _TABLES:
        return torch.bucketize(x, bounds, out_int32=True).to(torch.uint8)
    return torch.bucketize(x.abs(), bounds, out_int32=True).to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def decode(codes: torch.Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The grid values of uint8 codes."""
    if scheme.grid in _BYTES:
        return codes.view(_BYTES[scheme.grid]).to(dtype)
    # Four times as fast as indexing.
    return _tables(scheme.grid, scheme.bits, dtype, codes.device)[0].index_select(0, codes.flatten().int()).view(codes.shape)
