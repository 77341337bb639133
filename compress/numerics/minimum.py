"""Minimum: scale and minimum of each group of codes, by range or weighted search.

Legend: x a tensor of weights, reduced over one dimension, the group; s scale, m minimum, q code in 0 .. 2^b - 1; w' = s q + m;
h >= 0 the weight of an error. The range need not include zero, so groups on one side of it get finer steps, and no code
need mean zero. By the range, s = (max - min) / (2^b - 1) and m = min, moved so that what rounding s to its dtype has added
or taken lies at both ends alike; a group of equal weights has s = 1 and q = 0, so that m is their value.

The search shrinks the range about its middle, and takes for the codes of each try the s and m that minimise
sum h (x - s q - m)^2, a line through points; m is then the best for the s that is stored. Both are rounded to their stored
dtype before codes are computed and errors compared.
"""

from __future__ import annotations

import torch

from compress.spec.scheme import Scheme

_SHRINKS = torch.linspace(1.0, 0.6, 9).tolist()


def codes(x: torch.Tensor, s: torch.Tensor, m: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The nearest codes to x, as floats."""
    return torch.sub(x, m).div_(s).round_().clamp_(0, scheme.levels - 1)


def fit(
    x: torch.Tensor, h: torch.Tensor | None, dim: int, scheme: Scheme, dtype: torch.dtype, clip: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of `x` reduced over `dim`, which is kept, in x's dtype with values of `dtype`; h broadcasts to x."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    s, m = _of_range(low, high, scheme, dtype)
    if clip == "none":
        return s, m

    def error(s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        lost = codes(x, s, m, scheme).mul_(s).add_(m).sub_(x).square_()
        return (lost if h is None else lost.mul_(h)).sum(dim, keepdim=True)

    middle, best = (low + high) / 2, error(s, m)
    for shrink in _SHRINKS:
        tried = _of_range(middle + (low - middle) * shrink, middle + (high - middle) * shrink, scheme, dtype)
        for pair in (tried, _line(x, codes(x, *tried, scheme), h, dim, dtype, *tried)):
            lost = error(*pair)
            better = lost < best
            best = torch.where(better, lost, best)
            s, m = torch.where(better, pair[0], s), torch.where(better, pair[1], m)
    return s, m


def _of_range(low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of a range."""
    info, top = torch.finfo(dtype), scheme.levels - 1
    # Halved before it is subtracted, because a range of fp32 may be larger than the largest number.
    span = (high / 2 - low / 2) * (2 / top)
    s = torch.where(span == 0, torch.ones_like(span), span.clamp(info.tiny, info.max)).to(dtype).to(low.dtype)
    m = torch.where(span == 0, low, low / 2 + high / 2 - s * (top / 2))
    return s, m.clamp(info.min, info.max).to(dtype).to(low.dtype)


def _line(
    x: torch.Tensor, q: torch.Tensor, h: torch.Tensor | None, dim: int, dtype: torch.dtype, s: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and minimum of least error for these codes; `s` and `m` where they determine none."""
    h = torch.ones_like(x) if h is None else h.expand_as(x)
    mass = h.sum(dim, keepdim=True).clamp(min=1e-30)
    q_mean, x_mean = ((h * part).sum(dim, keepdim=True) / mass for part in (q, x))
    q_off, x_off = q - q_mean, x - x_mean
    curve = (h * q_off * q_off).sum(dim, keepdim=True)
    slope = ((h * q_off * x_off).sum(dim, keepdim=True) / curve.clamp(min=1e-30)).to(dtype).to(x.dtype)
    sound = (curve > 0) & (slope > 0) & slope.isfinite()
    slope = torch.where(sound, slope, s)
    found = (x_mean - slope * q_mean).to(dtype).to(x.dtype)
    return slope, torch.where(sound & found.isfinite(), found, m)
