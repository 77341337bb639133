"""K-quants: whole codes whose scales have two levels, as GGUF's Q2_K to Q6_K.

Legend: x weights in super-blocks of 256 columns, each of sub-blocks of 16 or 32; q code; a sub-block has a scale u and, in
q2_k, q4_k and q5_k, a minimum v, both small whole numbers; a super-block has d and e in fp16.

    q2_k, q4_k, q5_k   w' = (d u) q - (e v)           u, v in 0 .. 15 (q2_k) or 0 .. 63
    q3_k, q6_k         w' = (d u) (q - 2^(b-1))       u in -32 .. 31 (q3_k) or -128 .. 127

A sub-block's scale and minimum are searched as if they were floats, minima at or below zero. d takes the largest scale to
the end of the range of u, e the largest minimum to that of v; then u and v are the best, for rounding to nearest, among the
whole numbers near them, two to each side, or four where there are no minima. Where there are, numbers near the scale and minimum
of the whole range are tried too, because a search for floats leaves no room for the rounding of u and v. h >= 0 weights the
errors of columns. u is never 0: its codes could mean no less with 1, and one divides by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

from compress.numerics import fit as symmetric
from compress.numerics import minimum
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import SUPER, Scheme

_ENDS = {2: (0, 15), 3: (-32, 31), 4: (0, 63), 5: (0, 63), 6: (-128, 127)}
"""The range of u by bits of codes."""
_NEAR = (0, -1, 1, -2, 2)
_FAR = (*_NEAR, -3, 3, -4, 4)
_LEAST = 2.0**-24
"""The smallest number of fp16."""


class Levels(NamedTuple):
    """u and v int8 [rows, supers, subs], d and e fp16 [rows, supers]; v and e None where there are no minima."""

    scale: torch.Tensor
    minimum: torch.Tensor | None
    super_scale: torch.Tensor
    super_minimum: torch.Tensor | None

    def steps(self) -> torch.Tensor:
        """d u, fp32 [rows, supers, subs]; the product is exact."""
        return self.super_scale.float()[..., None] * self.scale.float()

    def lows(self) -> torch.Tensor | None:
        """-e v, fp32 like `steps`."""
        if self.minimum is None or self.super_minimum is None:
            return None
        return -(self.super_minimum.float()[..., None] * self.minimum.float())

    def of(self, scheme: Scheme, codes: torch.Tensor, rows: slice = slice(None)) -> QTensor:
        """The QTensor of some rows, with codes [..., columns] of them."""
        shape = (*codes.shape[:-1], -1)
        u, v, d, e = (None if part is None else part[rows].reshape(shape) for part in self)
        assert u is not None
        return QTensor(scheme, codes, u, minimum=v, super_scale=d, super_minimum=e)


def joined(parts: Sequence[Levels], dim: int) -> Levels:
    """Rows (dim 0) or super-blocks (dim 1) that follow each other."""
    u, v, d, e = (None if each[0] is None else torch.cat(each, dim) for each in zip(*parts, strict=True))
    assert u is not None
    assert d is not None
    return Levels(u, v, d, e)


def blocked(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[..., columns] as [..., supers, subs, group]."""
    assert scheme.group is not None
    found: torch.Tensor = x.unflatten(-1, (-1, SUPER // scheme.group, scheme.group))
    return found


def codes(x: torch.Tensor, levels: Levels, scheme: Scheme) -> torch.Tensor:
    """The nearest codes of blocked x, as floats."""
    s, m = levels.steps()[..., None], levels.lows()
    return _codes(x, s, None if m is None else m[..., None], scheme)


def values(q: torch.Tensor, s: torch.Tensor, m: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """What codes mean, in their place."""
    return q.sub_(scheme.middle).mul_(s) if m is None else q.mul_(s).add_(m)


def fit(x: torch.Tensor, h: torch.Tensor | None, scheme: Scheme, clip: str = "mse") -> Levels:
    """Scales and minima of `x` [rows, supers, subs, group]; h [supers, subs, group]; `clip` as in fit.py, for sub-blocks."""
    x = x.float()
    h = None if h is None else (h / h.mean().clamp(min=1e-30)).float()
    low, high = _ENDS[scheme.bits]
    s, m = _free(x, h, scheme, clip)
    largest = s.gather(-1, s.abs().argmax(-1, keepdim=True))
    d = _half(largest / (high if scheme.minimum else low))
    e = _half(m.neg().amax(-1, keepdim=True) / high)
    starts = [(s, m), _free(x, h, scheme, "none")] if scheme.minimum and clip != "none" else [(s, m)]
    u_best = v_best = torch.ones_like(s)
    best = torch.full_like(s, float("inf"))
    for (s, m), (du, dv) in product(starts, product(_NEAR, _NEAR) if scheme.minimum else product(_FAR, (0,))):
        u, v = _whole(_whole(s / d, low, high) + du, low, high), ((m.neg() / e).round_().clamp_(0, high) + dv).clamp_(0, high)
        steps, lows = (d * u)[..., None], -(e * v)[..., None] if scheme.minimum else None
        lost = values(_codes(x, steps, lows, scheme), steps, lows, scheme).sub_(x).square_()
        error = (lost if h is None else lost.mul_(h)).sum(-1)
        better = error < best
        best, u_best, v_best = (torch.where(better, new, old) for new, old in ((error, best), (u, u_best), (v, v_best)))
    u, d = u_best.to(torch.int8), d.squeeze(-1).half()
    return Levels(u, v_best.to(torch.int8), d, e.squeeze(-1).half()) if scheme.minimum else Levels(u, None, d, None)


def _free(x: torch.Tensor, h: torch.Tensor | None, scheme: Scheme, clip: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each sub-block as floats, [rows, supers, subs]; a sub-block of zeros has the scale 0."""
    plain = Scheme(scheme.bits, scheme.group, scheme.symmetric, minimum=scheme.minimum)
    if scheme.minimum:
        # With a zero of no weight among them the range includes zero, so that the minimum is at or below it.
        weight = torch.ones_like(x) if h is None else h.expand_as(x)
        more, none = torch.nn.functional.pad(x, (0, 1)), torch.nn.functional.pad(weight, (0, 1))
        s, m = minimum.fit(more, none, -1, plain, torch.float32, clip)
        m = m.clamp(max=0)
    else:
        s, m = symmetric.search(x, h, -1, plain, torch.float32, "none" if clip == "none" else "mse", True)
    return torch.where((x == 0).all(-1), 0, s.squeeze(-1)), m.squeeze(-1)


def _half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to fp16, in fp32; never 0, because one divides by it."""
    info = torch.finfo(torch.float16)
    rounded = x.clamp(info.min, info.max).half().float()
    return torch.where(rounded == 0, torch.where(x < 0, -_LEAST, _LEAST), rounded)


def _whole(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The nearest whole numbers but 0 in a range."""
    found = x.round().clamp_(low, high)
    return torch.where(found == 0, 1, found)


def _codes(x: torch.Tensor, s: torch.Tensor, m: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    if m is not None:
        return minimum.codes(x, s, m, scheme)
    return torch.div(x, s).round_().add_(scheme.middle).clamp_(0, scheme.levels - 1)
