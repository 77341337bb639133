"""Hard-concrete masks: their scores, their constraint, and what a high bound of log a does to what is kept."""

from __future__ import annotations

import math

import pytest
import torch

from compress.numerics import hard_concrete as hc


def test_score_rises_and_is_the_share_of_open_masks() -> None:
    log_a = torch.linspace(hc.LOWEST, hc.HIGHEST, 50)
    assert bool((hc.score(log_a).diff() > 0).all())
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for value in (-3.0, 0.0, 2.0):
        share = float((hc.sampled(torch.tensor(value), u) > 0).float().mean())
        assert share == pytest.approx(float(hc.score(torch.tensor(value))), abs=0.005)


@pytest.mark.parametrize(("log_a", "score", "settled"), [(math.log(100), 0.9980, 0.9960), (math.log(0.01), 0.0471, 0.0040)])
def test_values_of_the_paper_s_bounds(log_a: float, score: float, settled: float) -> None:
    assert float(hc.score(torch.tensor(log_a))) == pytest.approx(score, abs=1e-4)
    assert float(hc.settled(torch.tensor(log_a))) == pytest.approx(settled, abs=1e-4)


def test_masks_are_between_0_and_1_and_reach_both() -> None:
    z = hc.sampled(torch.zeros(10_000), torch.rand(10_000, generator=torch.Generator().manual_seed(1)))
    assert float(z.min()) == 0
    assert float(z.max()) == 1


def test_gradients_of_the_multipliers_are_the_gap_and_its_square() -> None:
    log_a, multipliers = torch.randn(3, 40), torch.zeros(2, requires_grad=True)
    hc.constraint(log_a, 0.3, multipliers).backward()
    gap = 1 - hc.score(log_a).mean(-1) - 0.3
    assert multipliers.grad is not None
    torch.testing.assert_close(multipliers.grad, torch.stack([gap.mean(), gap.square().mean()]))
    # So phi, which ascends from 0, never falls.
    assert float(multipliers.grad[1]) >= 0


def learned(lowest: float, steps: int = 800) -> torch.Tensor:
    """Masks of 256 parts of linear importance, of which half are wanted, by the constraint and a loss alone."""
    log_a = torch.full((256,), 5.0, requires_grad=True)
    multipliers = torch.zeros(2, requires_grad=True)
    importance = torch.linspace(0, 1, 256)
    masks = torch.optim.AdamW([{"params": [log_a]}, {"params": [multipliers], "maximize": True}], lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        with torch.no_grad():
            log_a.clamp_(lowest, hc.HIGHEST)
        z = hc.sampled(log_a, torch.rand(256, generator=generator))
        target = 0.5 * min(1, step / (0.2 * steps))
        loss = ((1 - z) * importance).mean() + hc.constraint(log_a, target, multipliers)
        masks.zero_grad()
        loss.backward()
        masks.step()
    with torch.no_grad():
        return hc.settled(log_a.clamp(lowest, hc.HIGHEST))


def test_a_high_bound_leaves_dead_parts_among_those_that_are_kept_and_ours_does_not() -> None:
    dead = {}
    for bound in (0.01, 1e-4):
        z = learned(math.log(bound)).sort(descending=True).values[:128]
        dead[bound] = float((z < 0.5).float().mean())
    assert math.log(1e-4) == hc.LOWEST
    assert dead[0.01] > 0.02, dead
    assert dead[1e-4] < 0.01, dead
