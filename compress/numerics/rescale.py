"""Rescale: the optimal scale and minimum of a group for the codes that it has.

Legend: c [columns, rows] codes less their zero point, s [rows] their scale; d = w - s c, or w - s c - m e with a minimum m and
e [columns, rows], 1 where a weight may differ from zero; A the block of H + lambda I of the group's columns; slope = (H +
lambda I) D in its rows. Moving s by a and m by b changes the damped loss by

    a^2 <c, A c> + 2 a b <c, A e> + b^2 <e, A e> - 2 a <c, slope> - 2 b <e, slope>.

Both functions move s (and m), d and slope in place and return each row's decrease of the damped loss. Where rounding to the
stored dtype cancels the gain nothing moves, and a scale never becomes zero or changes its sign.
"""

from __future__ import annotations

import torch


def scale(
    s: torch.Tensor, dtype: torch.dtype, c: torch.Tensor, d: torch.Tensor, slope: torch.Tensor, square: torch.Tensor
) -> torch.Tensor:
    """Moves the scale; `square` is A."""
    ch = square @ c
    along, curve = (c * slope).sum(0), (c * ch).sum(0)
    moved = (s + along / curve.clamp(min=1e-30)).to(dtype).to(s.dtype)
    step = moved - s
    fall = step * (2 * along - step * curve)
    better = (fall > 0) & (moved * s > 0) & moved.isfinite()
    step = torch.where(better, step, 0)
    s += step
    d.addcmul_(c, step, value=-1)
    slope.addcmul_(ch, step, value=-1)
    return fall.mul_(better)


def scale_and_minimum(
    s: torch.Tensor, m: torch.Tensor, dtype: torch.dtype, c: torch.Tensor, e: torch.Tensor, d: torch.Tensor,
    slope: torch.Tensor, square: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Moves both; the minimum is the best for the scale that is stored."""
    ch, eh = square @ c, square @ e
    along_c, along_e = (c * slope).sum(0), (e * slope).sum(0)
    cc, ce, ee = (c * ch).sum(0), (e * ch).sum(0), (e * eh).sum(0)
    det = cc * ee - ce * ce
    new_s = (s + (along_c * ee - along_e * ce) / det.clamp(min=1e-30)).to(dtype).to(s.dtype)
    a = new_s - s
    new_m = (m + (along_e - a * ce) / ee.clamp(min=1e-30)).to(dtype).to(m.dtype)
    b = new_m - m
    fall = 2 * (a * along_c + b * along_e) - (a * a * cc + 2 * a * b * ce + b * b * ee)
    better = (fall > 0) & (new_s * s > 0) & new_s.isfinite() & new_m.isfinite()
    a, b = torch.where(better, a, 0), torch.where(better, b, 0)
    s += a
    m += b
    for moved, one, other in ((d, c, e), (slope, ch, eh)):
        moved.addcmul_(one, a, value=-1).addcmul_(other, b, value=-1)
    return torch.where(better, fall, 0)
