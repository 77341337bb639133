"""Distances of hidden states: what they are by definition, and what must not move them."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from compress.numerics.features import (
    DENSITY_EPS,
    PAPER_EPS,
    PARITY_EPS,
    again,
    density_sum,
    intra_class_sum,
    projected_sum,
    square_sum,
    squarehead_sum,
)  # fmt: skip


def states(seed: int, tokens: int = 5, channels: int = 8) -> torch.Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squarehead(student: torch.Tensor, teacher: torch.Tensor, eps: float = PARITY_EPS) -> float:
    """A layer's term over all of these tokens."""
    mean_square = square_sum(teacher) / len(teacher)
    return float(squarehead_sum(student, teacher, mean_square, eps) / len(student))


@pytest.mark.parametrize("eps", [PARITY_EPS, PAPER_EPS])
def test_squarehead_is_the_definition(eps: float) -> None:
    s, t = states(0), states(1)
    pairs = list(zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
    lost, size = (sum(values) / len(pairs) for values in ([(a - b) ** 2 for a, b in pairs], [b**2 for _, b in pairs]))
    assert squarehead(s, t, eps) == pytest.approx(lost / (size + eps), rel=1e-12)


def test_squarehead_is_zero_only_at_equality_and_a_zero_student_costs_one() -> None:
    s, t = states(0), states(1)
    assert squarehead(t, t) == 0
    for place in product(range(2), range(2)):
        other = t.clone()
        other[place] += 1e-6
        assert squarehead(other, t) > 0
    assert squarehead(s, t) > 0
    for eps in (PARITY_EPS, PAPER_EPS):
        assert squarehead(torch.zeros_like(t), t, eps) == pytest.approx(1 - eps / (float(t.square().mean()) + eps), rel=1e-9)


def test_the_scale_of_both_counts_only_where_eps_is_not_small() -> None:
    s, t = states(0), states(1)
    assert squarehead(1e-2 * s, 1e-2 * t) == pytest.approx(squarehead(s, t), rel=1e-3)
    assert squarehead(1e-2 * s, 1e-2 * t, PAPER_EPS) < 0.05 * squarehead(s, t, PAPER_EPS)
    assert squarehead(1e3 * s, 1e3 * t, PAPER_EPS) == pytest.approx(squarehead(s, t, 0), rel=1e-6)


def test_parts_of_a_batch_add_up() -> None:
    s, t, mean_square, map_ = states(0), states(1), torch.tensor(0.7, dtype=torch.float64), states(2, 8)
    for function, more in ((squarehead_sum, (mean_square, 1e-8)), (projected_sum, (map_,))):
        whole = function(s, t, *more)
        torch.testing.assert_close(function(s[:2], t[:2], *more) + function(s[2:], t[2:], *more), whole)
        assert float(function(s[:0], t[:0], *more)) == 0


def test_half_precision_is_computed_in_fp32() -> None:
    s, t = states(0).bfloat16(), states(1).bfloat16()
    found = squarehead_sum(s, t, torch.tensor(1.0), PARITY_EPS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (s.float() - t.float()).square().mean(-1).sum() / (1 + PARITY_EPS))


def test_what_is_computed_again_has_the_same_gradient() -> None:
    s, t = states(0).requires_grad_(True), states(1)
    (one,) = torch.autograd.grad(squarehead_sum(s, t, t.square().mean(), 1e-8), s)
    (other,) = torch.autograd.grad(again(squarehead_sum, s, t, t.square().mean(), 1e-8), s)
    assert torch.equal(one, other)


def test_projected_states_are_compared_at_unit_size() -> None:
    s, t, map_ = states(0, channels=6), states(1, channels=8), states(2, 8, 6)
    expected = 0.0
    for a, b in zip(s, t, strict=True):
        a, b = a / a.square().mean().sqrt(), b / b.square().mean().sqrt()
        expected += sum((float(map_[i] @ a) - float(b[i])) ** 2 for i in range(8)) / 8
    assert float(projected_sum(s, t, map_)) == pytest.approx(expected, rel=1e-7)
    assert float(projected_sum(3 * s, 5 * t, map_)) == pytest.approx(expected, rel=1e-7)
    assert float(projected_sum(t, t, torch.eye(8, dtype=torch.float64))) == 0


def slow_intra_class(s: torch.Tensor, t: torch.Tensor, map_: torch.Tensor, classes: list[int], k: int) -> float:
    s, t = s / s.square().mean(-1, keepdim=True).sqrt(), t / t.square().mean(-1, keepdim=True).sqrt()
    total = 0.0
    for i, own in enumerate(classes):
        same = sorted((float((t[i] - t[j]).norm()), j) for j, other in enumerate(classes) if other == own and j != i)
        total += sum(float((map_ @ s[i] - t[j]).square().mean()) for _, j in same[:k])
    return total


@pytest.mark.parametrize("k", [1, 3, 50])
def test_a_small_class_takes_neighbours_from_no_other(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its place among the tokens: after a class of one or two, the others still have k."""
    monkeypatch.setattr("compress.numerics.features._ROWS", 4)
    classes = [7, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    s, t, map_ = states(0, len(classes)), states(1, len(classes)), states(2, 8)
    found = intra_class_sum(s, t, map_, torch.tensor(classes), k)
    assert float(found) == pytest.approx(slow_intra_class(s, t, map_, classes, k), rel=1e-6)
    for few in (0, 1):
        assert float(intra_class_sum(s[:few], t[:few], map_, torch.tensor(classes[:few]), k)) == 0


def test_intra_class_has_a_gradient_only_for_the_student() -> None:
    s, t, map_ = (x.requires_grad_(True) for x in (states(0), states(1), states(2, 8)))
    intra_class_sum(s, t, map_, torch.tensor([1, 1, 2, 2, 3]), 3).backward()
    assert t.grad is None
    assert s.grad is not None
    assert map_.grad is not None
    assert bool(s.grad.isfinite().all())
    assert float(s.grad[4].abs().max()) == 0, "the only token of its class"


def test_density_is_a_smooth_share_of_what_is_not_zero() -> None:
    a = states(0).relu()
    found = float(density_sum(a) / len(a))
    assert found == pytest.approx(float((a != 0).double().mean()), abs=1e-4)
    assert float(density_sum(torch.zeros(3, 8))) == 0
    assert float(density_sum(1e9 * torch.ones(3, 8))) == pytest.approx(3)
    small = [float(density_sum(torch.full((1, 8), size))) for size in (1e-6, 1e-5, math.sqrt(DENSITY_EPS), 1e-3, 1.0)]
    assert small == sorted(small)
    assert small[0] < 1e-4
    assert small[2] == pytest.approx(0.5)
