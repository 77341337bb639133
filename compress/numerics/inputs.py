"""Activations rounded as a model runs, with one dynamic scale per token.

Legend: x [..., width]; p its largest magnitude over the width, or over each 128 of it for `fp8-block`; s = p / 127.5 for
int8, -128 .. 127, and p / 448 for FP8 E4M3. Everything is computed in x's own dtype, so the values are those of
compressed-tensors. Keys and values in a cache have static scales, found beforehand in the same way.
"""

from __future__ import annotations

import torch

from compress.spec.scheme import BLOCK, Scheme


def rounded_inputs(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """`x` rounded as this scheme rounds activations, in the same shape and dtype."""
    if scheme.scales == "block":
        return _rounded(x.unflatten(-1, (-1, BLOCK)), scheme.inputs).flatten(-2)
    return _rounded(x, scheme.inputs)


def in_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., width] as q s, with q in E4M3 and s [..., 1] in x's dtype. In bf16, rounding q s again gives the same q and s."""
    s = _scale(x, 448.0)
    return _e4m3(x / s), s


def in_cache(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values [samples, heads, tokens, width] as E4M3 holds them with a scale [1], or [heads, 1, 1] for each head."""
    s = scale.to(x.device, x.dtype)
    return _e4m3(x / s).to(x.dtype) * s


def cache_scale(peak: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale in `dtype` for magnitudes up to `peak`; 1 where there are none, so that nothing is divided by zero."""
    s = (peak.double() / 448).to(dtype)
    return torch.where(s == 0, 1.0, s)


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def _rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        s = _scale(x, 127.5)
        return (x / s).clamp(-128, 127).round() * s
    q, s = in_fp8(x)
    return q.to(x.dtype) * s


def _scale(x: torch.Tensor, top: float) -> torch.Tensor:
    s = x.abs().amax(-1, keepdim=True) / top
    return torch.where(s == 0, torch.finfo(x.dtype).eps, s)
