"""Fit: scale and zero point of each group, by its range or a weighted search.

Legend: x [columns, a, b] weights, reduced over one dimension, the group; s scale, z zero point, c = code - z,
w' = s c; h_i >= 0 the weight of an error in column i. The search tries ranges from the full one down, and keeps
the one with the least sum_i h_i (x_i - s c_i)^2, then sets s to the optimum for its codes.

A symmetric code ranges from -2^(b-1) to 2^(b-1) - 1, so the negative side has one more level. With `signed` a group whose
largest weight is positive gets a negative scale, which gives its side the extra level. At 2 and 3 bits that adds half of
GPTQ's gain over rounding (llama.cpp's Q4_0 does the same). Where a scheme has minima, minimum.py fits them, in the place of z.
"""

from __future__ import annotations

from typing import Literal

import torch

from compress.numerics import minimum
from compress.numerics.grid import grid_of
from compress.spec.scheme import Scheme

Clip = Literal["none", "mse"]

_CHUNK = 1 << 16
"""Elements worked on at a time, so that temporaries stay in a core's cache."""
_SHRINKS = torch.linspace(1.0, 0.65, 8).tolist()


def fit(
    x: torch.Tensor, weight: torch.Tensor | None, dim: int, scheme: Scheme, dtype: torch.dtype, clip: Clip, signed: bool,
    least_zero: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Scale and zero point or minimum of `x` reduced over `dim` (0 or 2), which is kept; scale and minimum are values of `dtype`.

    `weight` [columns] is h; None if it is the same for all, as along the outputs. z is the middle code if symmetric.
    """
    across = 2 - dim
    step = max(1, _CHUNK * x.shape[across] // max(1, x.numel()))
    h = None if weight is None else (weight / weight.mean().clamp(min=1e-30)).to(x.dtype).reshape(-1, 1, 1)
    found = [search(part, h, dim, scheme, dtype, clip, signed, least_zero) for part in x.split(step, across)]
    s, z = (torch.cat(parts, across) for parts in zip(*found, strict=True))
    return s, z


def meant(w: torch.Tensor, scheme: Scheme, dtype: torch.dtype, clip: Clip, signed: bool, least_zero: int = 0) -> torch.Tensor:
    """`w` [rows, columns] rounded to nearest integers of `scheme` with these ranges, and dequantized: fp32."""
    group = scheme.group or w.shape[1]
    parts = []
    for part in w.float().split(len(w[0]) // group * group or group, dim=1):  # a ragged last group has a scale of its own
        x = part.unflatten(1, (-1, min(group, part.shape[1]))).permute(2, 1, 0)
        s, z = fit(x, None, 0, scheme, dtype, clip, signed, least_zero)
        if scheme.minimum:
            values = minimum.codes(x, s, z, scheme).mul_(s).add_(z)
        else:
            values = torch.clamp(torch.div(x, s).round_(), -z, scheme.levels - 1 - z).mul_(s)
        parts.append(values.permute(2, 1, 0).flatten(1))
    return torch.cat(parts, dim=1)


def search(
    x: torch.Tensor, h: torch.Tensor | None, dim: int, scheme: Scheme, dtype: torch.dtype, clip: Clip, signed: bool,
    least_zero: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`fit` of a part, with h that broadcasts to x, along any dimension."""
    if scheme.minimum:
        return minimum.fit(x, h, dim, scheme, dtype, clip)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if clip == "none":
        s, z = grid_of(low, high, scheme, dtype, least_zero)
        return s.to(x.dtype), z.to(x.dtype)
    top = scheme.levels - 1
    c, scratch = torch.empty_like(x), torch.empty_like(x)
    hx = x if h is None else x * h
    sign = torch.where(high > -low, -1.0, 1.0).to(x.dtype) if signed and scheme.symmetric else None

    def moments(s: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum h x c, sum h c^2) with the codes of this scale and zero point."""
        torch.div(x, s, out=c).round_()
        if scheme.symmetric:
            c.clamp_(-scheme.middle, top - scheme.middle)
        else:
            torch.clamp(c, -z, top - z, out=c)
        along = torch.mul(c, hx, out=scratch).sum(dim, keepdim=True)
        square = torch.mul(c, c, out=scratch) if h is None else torch.mul(c, c, out=scratch).mul_(h)
        return along, square.sum(dim, keepdim=True)

    best = torch.full_like(low, float("inf"))
    s_best, z_best = (part.to(x.dtype) for part in grid_of(low, high, scheme, dtype, least_zero))
    exact = s_best
    for shrink in _SHRINKS:
        s, z = grid_of(low * shrink, high * shrink, scheme, dtype, least_zero)
        s, z = s.to(x.dtype), z.to(x.dtype)
        if sign is not None:
            s = s * sign
        along, square = moments(s, z)
        error = s * (s * square - 2 * along)  # the squared error less sum h x^2, which is constant
        better = error < best
        best = torch.where(better, error, best)
        s_best, z_best = torch.where(better, s, s_best), torch.where(better, z, z_best)
        exact = torch.where(better, along / square.clamp(min=1e-30), exact)
    moved = exact.to(dtype).to(x.dtype)
    along, square = moments(torch.where(moved == 0, s_best, moved), z_best)
    better = (moved * (moved * square - 2 * along) < best) & (moved * s_best > 0)
    return torch.where(better, moved, s_best), z_best
