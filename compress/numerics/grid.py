"""Integer grids: scales and codes of a matrix by rounding, in fp32.

Legend: w [rows, columns]; s scale, z zero point, q code, all per row and group of columns;
w' = s (q - z). Symmetric: s = absmax / ((2^b - 1) / 2) and z = 2^(b-1), so the grid is
-2^(b-1) .. 2^(b-1) - 1 and the largest weight errs by at most s/2 (the convention of GPTQ and
llm-compressor; 19.1 dB on Gaussian weights at 4 bits and groups of 128, where s = absmax / 7 gives 18.6).
Asymmetric: the range is stretched to include zero, s = (max - min) / (2^b - 1), z = round(-min / s). A format that cannot
store z = 0 requires z >= 1; if that cuts the range, s grows until it reaches max again. With a minimum m instead of z,
w' = s q + m: see minimum.py.
Scales are rounded to the dtype they will be stored in *before* codes are computed, so that codes fit the
stored scales. All-zero groups get s = 1 and the code of zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compress.numerics import minimum
from compress.spec.scheme import Scheme

_CHUNK = 1 << 18
"""Elements processed at a time, so that fp32 temporaries stay in a core's cache."""


class Rounded(NamedTuple):
    """codes uint8 [rows, columns]; scale [rows, groups]; zero uint8, or minimum like scale, or None; sums of squares."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    squared_error: float
    squared_norm: float


def round_to_nearest(
    w: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, clip: str = "none", least_zero: int = 0, least_code: int = 0
) -> Rounded:
    """Rounds `w` [rows, columns] to `scheme`; `clip="mse"` searches each group's range for the least squared error.

    `least_zero` is the smallest zero point of asymmetric codes, `least_code` the smallest code that is used: with 1 a symmetric
    grid is -(2^(b-1) - 1) .. 2^(b-1) - 1, as MoQE has it.

    A ragged last group is allowed here: it has a scale of its own.
    """
    rows, columns = w.shape
    group = scheme.group or columns
    groups = scheme.groups(columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=w.device)
    scale = torch.empty(rows, groups, dtype=scale_dtype, device=w.device)
    kind = scale_dtype if scheme.minimum else torch.uint8
    zero = None if scheme.symmetric else torch.empty(rows, groups, dtype=kind, device=w.device)
    whole = columns // group
    sums = [0.0, 0.0]
    step = max(1, _CHUNK // columns)
    for r0 in range(0, rows, step):
        rs = slice(r0, min(rows, r0 + step))
        for g0, g1, width in ((0, whole, group), (whole, groups, columns - whole * group)):
            if g0 == g1:
                continue
            cs = slice(g0 * group, g0 * group + (g1 - g0) * width)
            part = w[rs, cs].to(torch.float32).reshape(-1, g1 - g0, width)
            s, z = _fit(part, scheme, scale_dtype, clip, least_zero, least_code)
            q = _codes(part, s, z, scheme, least_code)
            # Via int16, because torch converts fp32 to uint8 four times slower.
            codes[rs, cs] = q.reshape(q.shape[0], -1).to(torch.int16).to(torch.uint8)
            scale[rs, g0:g1] = s.squeeze(-1).to(scale_dtype)
            if zero is not None:
                zero[rs, g0:g1] = z.squeeze(-1).to(kind)
            error = _values(q, s, z, scheme).sub_(part)
            for i, values in enumerate((error.reshape(-1), part.reshape(-1))):
                sums[i] += float(torch.dot(values, values))
    return Rounded(codes, scale, zero, sums[0], sums[1])


def _codes(part: torch.Tensor, s: torch.Tensor, z: torch.Tensor, scheme: Scheme, least_code: int) -> torch.Tensor:
    """fp32 codes [rows, groups, width], least_code .. levels - 1."""
    if scheme.minimum:
        return minimum.codes(part, s, z, scheme)
    return torch.div(part, s).round_().add_(z).clamp_(least_code, scheme.levels - 1)


def _values(q: torch.Tensor, s: torch.Tensor, z: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What codes q mean, in their place; z is the zero point or minimum."""
    return q.mul_(s).add_(z) if scheme.minimum else q.sub_(z).mul_(s)


def _fit(
    part: torch.Tensor, scheme: Scheme, dtype: torch.dtype, clip: str, least_zero: int, least_code: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point or minimum [rows, groups, 1] in fp32, but for zero points already rounded to `dtype`."""
    if scheme.minimum:
        return minimum.fit(part, None, -1, scheme, dtype, clip)
    low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
    s, z = grid_of(low, high, scheme, dtype, least_zero)
    if clip == "none":
        return s, z
    best = torch.full_like(s, float("inf"))
    s_best, z_best = s, z
    for shrink in torch.linspace(1.0, 0.3, 57).tolist():
        s, z = grid_of(low * shrink, high * shrink, scheme, dtype, least_zero)
        error = _codes(part, s, z, scheme, least_code).sub_(z).mul_(s).sub_(part).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        s_best, z_best = torch.where(better, s, s_best), torch.where(better, z, z_best)
    return s_best, z_best


def grid_of(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype, least_zero: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, rounded to `dtype`, and zero point of ranges `low` to `high`, all of one shape, in fp32."""
    top = scheme.levels - 1
    if scheme.symmetric:
        span = torch.maximum(low.neg(), high).mul_(2 / top)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        span = (high - low).div_(top)
        if least_zero:
            span = torch.where(low.neg() < (least_zero - 0.5) * span, torch.maximum(span, high / (top - least_zero)), span)
    # Clamped to the smallest normal number, so that a tiny range gets no zero scale; an all-zero range gets the scale 1.
    tiny = torch.finfo(dtype).tiny
    s = torch.where(span == 0, torch.ones_like(span), span.clamp(tiny, torch.finfo(dtype).max)).to(dtype).float()
    z = torch.full_like(s, scheme.middle) if scheme.symmetric else (low.neg() / s).round_().clamp_(least_zero, top)
    return s, z


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """fp32 `scale * (code - zero)`, [..., rows, columns] from codes of that shape and scales [..., rows, groups].

    With minima in the place of zero points it is `scale * code + minimum`.
    """
    columns = codes.shape[-1]
    group = scheme.group or columns
    z = zero.float() if zero is not None else torch.full_like(scale, scheme.middle, dtype=torch.float32)

    if columns % group == 0:
        # The same result, without expanded scales.
        parts = codes.float().unflatten(-1, (-1, group))
        return _values(parts, scale.float()[..., None], z[..., None], scheme).flatten(-2)

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.repeat_interleave(group, dim=-1)[..., :columns]

    return _values(codes.float(), spread(scale.float()), spread(z), scheme)
