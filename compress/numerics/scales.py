"""Scales of float grids: choosing, storing and expanding them.

Legend: w [rows, columns]; s scale of a group or block, p its largest magnitude, t the grid's largest value; w' = s v with v
a value of the grid, and s = p / t by default. Scales are rounded to their stored form *before* codes are
computed: to the weight's dtype (FP8's too, though they are stored in fp32, as in other tools), or
    e8m0  a byte u, s = 2^(u - 127): the least power that clips nothing (`rceil`, NVIDIA), OCP's 2^(floor(log2 p) - 2)
          (`floor`), the same after p is rounded to one bit of mantissa (`even`), or the best of three (`mse`); 255 is NaN
    e4m3  s = e4m3(p D / t) / D with D = 448 t / p of the matrix in fp32 (NVFP4). Matrices that readers fuse must share
          D: p is then the largest magnitude of all. D is stored as a divisor, because its reciprocal would not be
          exact. 4/6: D = 256 t / p, and each block takes p / 6 or p / 4, whichever errs less.
    m1, m2  per row, S 2^-k with k = 0 .. 8: S is a power of two, or the row's largest scale (ZeroQuant-FP, 2307.09782,
          whose groups of such scales are rows here); the power is the nearest in the logarithm, or the next one (`ceil`)
Exponents are read from the bits, never from a logarithm. Groups of zeros have the scale 1 if nothing else fixes it, or 0 if no
value of the grid is zero. iq4's values reach farther below zero than above, so its scales may be negative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from compress.numerics.floats import decode, encode, top
from compress.spec.scheme import Scheme

_SHRINKS = tuple(torch.linspace(1.0, 0.5, 21).tolist())
_NEIGHBOURS = (1.0, 0.5, 2.0)
_E4M3_TOP, _E4M3_LEAST = 448.0, 2.0**-9
_SHIFTS = 8
"""Powers of two by which E2M1 can be scaled down inside E4M3 without losing a bit."""
_FRACTION = 0x7FFFFF
_THRESHOLDS = {"floor": _FRACTION, "even": 0x5FFFFF, "rceil": 0x400000, "round": 0x3504F3, "ceil": 0}
"""The largest fp32 mantissa that is not rounded up to the next power: below 2, 1.75, 1.5, sqrt(2), and 1."""


def steps(scale: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> torch.Tensor:
    """The fp32 values of stored scales [experts?, r, g]; bytes are E8M0, where 255 is NaN."""
    if scale.dtype == torch.uint8:
        bits = scale.to(torch.int32)
        powers = (bits << 23).view(torch.float32)
        powers = torch.where(bits == 0, torch.tensor(2.0**-127), powers)
        return torch.where(bits == 255, torch.tensor(float("nan")), powers)
    return scale.float() if tensor_scale is None else scale.float() / tensor_scale[..., None, None]


def spread(per_scale: torch.Tensor, scheme: Scheme, rows: int, columns: int) -> torch.Tensor:
    """Scales [..., r, g] expanded to [..., rows, columns]."""
    height = scheme.rows_per_scale(rows)
    if height > 1:
        per_scale = per_scale.repeat_interleave(height, dim=-2)[..., :rows, :]
    return per_scale.repeat_interleave(scheme.group or columns, dim=-1)[..., :columns]


def blocked(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[..., rows, columns] as [..., r, height, g, width], each [height, width] under one scale; padded with zeros."""
    rows, columns = x.shape[-2:]
    height, width = scheme.rows_per_scale(rows), scheme.group or columns
    down, along = -rows % height, -columns % width
    if down or along:
        x = pad(x, (0, along, 0, down))
    found: torch.Tensor = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    return found


def flat(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `blocked`."""
    return x.flatten(2).flatten(0, 1)[:rows, :columns]


def divisor(peak: float, scheme: Scheme, device: torch.device | None = None) -> torch.Tensor | None:
    """D of a matrix whose largest magnitude is `peak`, fp32 [] on a device; None for schemes without such a divisor."""
    if scheme.scales != "e4m3":
        return None
    most = 256.0 if scheme.rule == "4over6" else _E4M3_TOP
    found = torch.tensor(most * top(scheme), dtype=torch.float32) / torch.tensor(peak, dtype=torch.float32)
    return (found if bool(found.isfinite()) and float(found) > 0 else torch.tensor(1.0)).to(device)


def fit(
    w: torch.Tensor, scheme: Scheme, dtype: torch.dtype, clip: str, peak: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales [r, g] of `w` [rows, columns] in their stored form, for weights of `dtype`.

    `peak` is the largest magnitude of the matrix and of all that share scales with it. `clip="mse"` searches each scale for
    the least squared error, weighted by `weight` [columns] if given; FP8, whose range is ample, has nothing to search.
    """
    x = blocked(w, scheme)
    if scheme.scales == "tensor":
        largest = torch.full((1, 1), peak, device=w.device)
    else:
        low, high = x.amin((1, 3)), x.amax((1, 3))
        largest = torch.maximum(low.neg(), high).float()
    d = divisor(peak, scheme, w.device)
    store = _store(largest, scheme, dtype, d)
    factors = _factors(scheme, clip)
    chosen = torch.ones_like(largest)
    if len(factors) > 1:
        width = x.shape[3]
        h = None if weight is None else pad(weight.to(w.dtype), (0, -len(weight) % width)).view(1, 1, -1, width)
        best = torch.full_like(largest, float("inf"), dtype=w.dtype)
        for factor in factors:
            s = steps(store(largest * factor), d).to(w.dtype)[:, None, :, None]
            error = decode(encode(x / s, scheme), scheme, w.dtype).mul_(s).sub_(x).square_()
            error = (error if h is None else error.mul_(h)).sum((1, 3))
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, factor, chosen)
    return store(largest * chosen)


def _factors(scheme: Scheme, clip: str) -> tuple[float, ...]:
    """Factors of the largest magnitude that are tried in turn; of equal errors the first is taken."""
    own = {"mse": _NEIGHBOURS, "4over6": (1.0, 1.5)}.get(scheme.rule, (1.0, -1.0) if scheme.grid == "iq4" else (1.0,))
    if clip == "none" or scheme.bits == 8:
        return own
    if scheme.grid == "iq4":
        return tuple(sign * shrink for shrink in _SHRINKS[:16:2] for sign in (1.0, -1.0))
    coarse = scheme.scales == "e8m0" or scheme.rule.startswith("m")
    return _NEIGHBOURS if coarse else (*own, *_SHRINKS[1:])


def _store(
    largest: torch.Tensor, scheme: Scheme, dtype: torch.dtype, d: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from magnitudes [r, g] to stored scales; `largest`, of all weights, fixes scales that depend on their row."""
    t, how = top(scheme), scheme.rule.rpartition("-")[2]
    if scheme.scales == "e8m0":
        rule = {"": "rceil", "mse": "floor"}.get(how, how)
        return lambda p: _e8m0(p, rule)
    if d is not None:
        # A block of zeros gets the scale 1; any scale gives zeros.
        return lambda p: torch.where(p == 0, 1, (p * d / t).clamp(_E4M3_LEAST, _E4M3_TOP)).to(torch.float8_e4m3fn)
    info = torch.finfo(dtype)

    def plain(p: torch.Tensor) -> torch.Tensor:
        # Clamped to the smallest normal number, so that a tiny group gets no zero scale.
        size = (p.abs() / t).clamp(info.tiny, info.max)
        return torch.where(p == 0, 0 if scheme.zeroless else 1, torch.copysign(size, p)).to(dtype)

    if not scheme.rule:
        return (lambda p: plain(p).float()) if scheme.bits == 8 else plain
    row = largest.amax(-1, keepdim=True)
    power = "ceil" if how == "ceil" else "round"
    base, least = plain(row).float(), int(_exponent(torch.tensor(info.tiny), "floor"))
    if scheme.rule.startswith("m1"):
        base = torch.ldexp(torch.ones_like(base), _exponent(row / t, power).clamp(least, 127))
    most = (_exponent(base, "floor") - least).clamp(0, _SHIFTS)

    def shifted(p: torch.Tensor) -> torch.Tensor:
        s = p / t
        k = _exponent(base, "floor") - _exponent(s, power) if scheme.rule.startswith("m1") else _exponent(row / p, power)
        return torch.ldexp(base.expand_as(s), -torch.minimum(k.clamp(min=0), most)).to(dtype)

    return shifted


def _exponent(x: torch.Tensor, how: str) -> torch.Tensor:
    """int32 e, where 2^e is the power near |x| by the rule `how`; -127 for |x| below 2^-126, 128 if not finite."""
    bits = x.abs().float().contiguous().view(torch.int32)
    whole = bits >> 23
    return whole - 127 + ((whole < 255) & ((bits & _FRACTION) > _THRESHOLDS[how])).int()


def _e8m0(p: torch.Tensor, how: str) -> torch.Tensor:
    """E8M0 bytes for magnitudes `p` of E2M1 groups, whose largest value is 1.5 * 2^2."""
    e = _exponent(p, how)
    u = torch.where(p == 0, 127, (e - 2 + 127).clamp(0, 254))
    return torch.where(p.isfinite(), u, 255).to(torch.uint8)
