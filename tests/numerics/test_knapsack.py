"""Exact allocation: against every combination, with the properties of an optimum, and at the size of a large model."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from compress.numerics.knapsack import choose

Problem = tuple[list[list[float]], list[list[int]]]


def cost_of(problem: Problem, found: list[int]) -> tuple[float, int]:
    return sum(v[c] for v, c in zip(problem[0], found)), sum(m[c] for m, c in zip(problem[1], found))


def by_trying_all(problem: Problem, budget: int) -> float:
    choices = itertools.product(*(range(len(v)) for v in problem[0]))
    return min(cost for cost, size in (cost_of(problem, list(c)) for c in choices) if size <= budget)


def problem_of(kind: str, items: int, seed: int) -> Problem:
    """Costs that fall with size, that do not, or that are equal; sizes of layers, of anything, or with one choice."""
    draw = random.Random(seed)
    costs = [sorted((draw.random() for _ in range(3)), reverse=kind != "signed") for _ in range(items)]
    if kind == "signed":
        costs = [[draw.uniform(-1, 1) for _ in range(3)] for _ in range(items)]
    if kind == "ties":
        costs = [[float(draw.randrange(3)) for _ in range(3)] for _ in range(items)]
    sizes = [[draw.choice((16, 43)) * bits for bits in (2, 3, 4)] for _ in range(items)]
    if kind == "odd":
        sizes = [sorted(draw.randrange(1, 1000) for _ in range(3)) for _ in range(items)]
    return costs, sizes


@pytest.mark.parametrize("kind", ["falling", "signed", "ties", "odd"])
@pytest.mark.parametrize("seed", range(12))
def test_is_as_good_as_trying_all(kind: str, seed: int) -> None:
    problem = problem_of(kind, random.Random(seed).randrange(1, 8), seed)
    least, most = (sum(f(m) for m in problem[1]) for f in (min, max))
    for budget in sorted({least, (3 * least + most) // 4, (least + most) // 2, (least + 3 * most) // 4, most, most + 7}):
        cost, size = cost_of(problem, choose(*problem, budget))
        assert size <= budget
        assert cost == pytest.approx(by_trying_all(problem, budget), rel=1e-12, abs=1e-12)


def test_ten_items_of_three_choices() -> None:
    problem = problem_of("signed", 10, 1)
    budget = sum(m[1] for m in problem[1])
    assert cost_of(problem, choose(*problem, budget))[0] == pytest.approx(by_trying_all(problem, budget))


@pytest.mark.parametrize("kind", ["falling", "odd"])
def test_more_budget_never_costs_more_and_no_uniform_choice_that_fits_is_better(kind: str) -> None:
    problem = problem_of(kind, 60, 3)
    least, most = (sum(f(m) for m in problem[1]) for f in (min, max))
    costs = [cost_of(problem, choose(*problem, budget))[0] for budget in range(least, most + 1, max(1, (most - least) // 40))]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(costs))
    for c in range(3):
        cost, size = cost_of(problem, [c] * 60)
        assert cost_of(problem, choose(*problem, size))[0] <= cost + 1e-12
    assert choose(*problem, most) == [2] * 60


def test_a_scale_of_all_costs_changes_nothing() -> None:
    costs, sizes = problem_of("falling", 40, 5)
    budget = sum(m[1] for m in sizes)
    wanted = choose(costs, sizes, budget)
    for c in (2.0**-40, 0.25, 2.0**30):
        assert choose([[c * v for v in each] for each in costs], sizes, budget) == wanted


def test_what_does_not_fit_is_refused_with_the_least_that_does() -> None:
    with pytest.raises(ValueError, match="12 is the least"):
        choose([[1.0, 0.0], [1.0, 0.0]], [[4, 9], [8, 9]], 11)
    assert choose([[1.0, 0.0], [1.0, 0.0]], [[4, 9], [8, 9]], 12) == [0, 0]


def test_an_item_with_one_choice_and_none_at_all() -> None:
    assert choose([], [], 0) == []
    assert choose([[3.0], [2.0, 1.0]], [[5], [1, 2]], 7) == [0, 1]


@pytest.mark.parametrize("kind", ["falling", "odd"])
@pytest.mark.parametrize("share", [0.5, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.2, 0.9))])
def test_thousands_of_weights_take_seconds(kind: str, share: float) -> None:
    problem = problem_of(kind, 4000, 7)
    started = time.process_time()
    least, most = (sum(f(m) for m in problem[1]) for f in (min, max))
    budget = round(least + share * (most - least))
    assert cost_of(problem, choose(*problem, budget))[1] <= budget
    assert time.process_time() - started < 10
