"""How ranges shrink when groups are halved: against a slow oracle, and what must hold for any weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from compress.numerics.granularity import halvings, widths


def slow(w: torch.Tensor, old: int, new: int, symmetric: bool) -> list[float]:
    """Every ratio of one halving, group by group."""

    def extent(x: torch.Tensor) -> float:
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        return max(-low, high) if symmetric else high - low

    found = []
    for row in w:
        for start in range(0, len(row), new):
            whole = extent(row[start // old * old : start // old * old + old])
            found.append(extent(row[start : start + new]) / whole if whole else 1.0)
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 96])
def test_halvings_are_those_of_the_oracle(columns: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(5, columns)
    w[2], w[3, :16], w[4] = 0, 0, w[4].abs()
    groups = widths(columns, 8)
    for step, (old, new) in zip(halvings(w, groups, symmetric), pairwise(groups), strict=True):
        ratios = slow(w, old, new, symmetric)
        assert tuple(step) == pytest.approx((sum(ratios) / len(ratios), min(ratios), max(ratios)), rel=1e-6)


def test_fused_experts_are_taken_together() -> None:
    w = torch.randn(3, 4, 64)
    assert halvings(w, [64, 32], True) == halvings(w.reshape(12, 64), [64, 32], True)


@pytest.mark.parametrize(
    ("columns", "least", "found"), [(64, 16, [64, 32, 16]), (172, 16, [172, 86, 43]), (448, 64, [448, 224, 112])]
)
def test_widths_are_halves_of_all_columns(columns: int, least: int, found: list[int]) -> None:
    assert widths(columns, least) == found


def test_of_magnitudes_one_half_always_keeps_the_largest() -> None:
    """So the largest ratio is 1, the mean at least a half, and no range ever grows."""
    torch.manual_seed(0)
    for w in (torch.randn(64, 1024), torch.randn(8, 256).exp(), torch.eye(64)):
        for step in halvings(w, widths(w.shape[-1], 16), True):
            assert step.most == 1
            assert 0.5 <= step.mean <= 1
            assert 0 <= step.least <= 1
