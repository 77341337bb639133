"""Granularity: how much ranges shrink when groups of columns are halved.

Legend: w [rows, columns] in groups of B columns; r(B) the range of a group, its largest magnitude, or for codes with a zero
point max - min with zero included, without it for codes with a minimum. Halving makes two groups of one, each with a ratio
r(B/2) / r(B) <= 1. For magnitudes one of the two halves keeps the range, so the largest ratio is always 1 and the mean lies
between 1/2 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Halving(NamedTuple):
    """Mean, smallest and largest ratio of new range to old over all halved groups; a group of zeros has a ratio of 1."""

    mean: float
    least: float
    most: float


def widths(columns: int, least: int) -> list[int]:
    """Group sizes: all columns, then halved again and again while that is a whole number and not below `least`."""
    found = [columns]
    while found[-1] % 2 == 0 and found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def halvings(w: torch.Tensor, groups: Sequence[int], symmetric: bool, minimum: bool = False) -> list[Halving]:
    """One Halving for each step between successive `groups` (from `widths`); w [..., columns]."""
    low, high = (part.float() for part in w.unflatten(-1, (-1, groups[-1])).aminmax(dim=-1))
    if not minimum:
        low, high = low.clamp(max=0), high.clamp(min=0)
    found: list[Halving] = []
    new = _ranges(low, high, symmetric)
    for _ in groups[1:]:
        low, high = low.unflatten(-1, (-1, 2)).amin(-1), high.unflatten(-1, (-1, 2)).amax(-1)
        old = _ranges(low, high, symmetric)
        wide = old.repeat_interleave(2, dim=-1)
        ratio = torch.where(wide == 0, 1, new / wide)
        found.append(Halving(float(ratio.mean(dtype=torch.float64)), float(ratio.amin()), float(ratio.amax())))
        new = old
    return found[::-1]


def _ranges(low: torch.Tensor, high: torch.Tensor, symmetric: bool) -> torch.Tensor:
    return torch.maximum(low.neg(), high) if symmetric else high - low
