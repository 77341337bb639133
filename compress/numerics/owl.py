"""OWL: the share of outliers in a block, and the shares of zeros that follow.

Yin et al., 2310.05175. Legend: S the scores of all entries of a block together; D = 100 times the share of S > M mean(S);
p the share of zeros over all; lambda half of the most by which shares differ.
    r = 2 lambda (D - min D) / (max D - min D),    density = r - mean(r) + 1 - p
The paper's blocks are equally large. Here the mean is weighted by the blocks' entries, so that p always holds for all together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

_DIGITS = 7
"""Decimals of a share, which is part of a weight's state: their mean is within 1e-7 of p."""


def outlier_share(scores: Callable[[], Iterable[torch.Tensor]], m: float) -> float:
    """D, in percent; `scores` yields those of each matrix, and is called twice so that one is in memory at a time."""
    total, count = 0.0, 0
    for score in scores():
        total += float(score.sum(dtype=torch.float64))
        count += score.numel()
    if not count:
        return 0.0
    limit = m * total / count
    return 100 * sum(int((score > limit).sum()) for score in scores()) / count


def shares(outliers: Sequence[float], sizes: Sequence[int], p: float, lam: float) -> list[float]:
    """The share of zeros of each block, of `sizes` entries; all are p if no block has more outliers than another."""
    low, high = min(outliers), max(outliers)
    ratios = [2 * lam * (share - low) / (high - low) if high > low else 0.0 for share in outliers]
    mean = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    return [round(p + mean - ratio, _DIGITS) for ratio in ratios]
