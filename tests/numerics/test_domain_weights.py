"""Weights of domains against numbers by hand, and what must hold of every update."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.domain_weights import Rule, updated

NAN = math.nan
SMOOTHING = 1e-4


def test_the_papers_form_by_hand() -> None:
    """0.5 e^0.2, 0.3 e^0 (below its reference) and 0.2 e^1, over their sum."""
    parts = [0.5 * 1.2214027581601699, 0.3, 0.2 * 2.718281828459045]
    found = updated([0.5, 0.3, 0.2], [2.2, 1.0, 3.0], [2.0, 1.5, 2.0], "paper")
    assert found == pytest.approx([part / 1.4543577447718939 for part in parts], rel=1e-12)
    assert found == pytest.approx([0.41991139, 0.20627662, 0.37381199], abs=1e-8)


def test_the_codes_form_by_hand() -> None:
    """0.5 e^0.4, 0.3 e^-1 and 0.2 e^2, eta 2; then a hundredth of each goes to a third of it."""
    parts = [0.5 * 1.4918246976412703, 0.3 * 0.36787944117144233, 0.2 * 7.38905609893065]
    found = updated([0.5, 0.3, 0.2], [2.2, 1.0, 3.0], [2.0, 1.5, 2.0], "code", eta=2.0, smoothing=0.01)
    assert found == pytest.approx([0.99 * part / 2.334087400958198 + 0.01 / 3 for part in parts], rel=1e-12)
    assert found == pytest.approx([0.31971104, 0.05014400, 0.63014495], abs=1e-8)


def test_a_domain_below_its_reference_loses_share_in_the_codes_form_only() -> None:
    losses, references = [1.0, 2.0], [2.0, 2.0]
    assert updated([0.5, 0.5], losses, references, "paper") == [0.5, 0.5]
    below, above = updated([0.5, 0.5], losses, references, "code")
    assert below == pytest.approx(1 / (1 + math.e))
    assert above == pytest.approx(math.e / (1 + math.e))


def test_a_domain_without_a_loss_keeps_its_share() -> None:
    found = updated([0.5, 0.3, 0.2], [3.0, NAN, 2.0], [2.0, 1.0, 2.0], "paper")
    assert found[1] == pytest.approx(0.3)
    assert found[0] == pytest.approx(0.7 * 0.5 * math.e / (0.5 * math.e + 0.2))
    assert updated([0.5, 0.5], [NAN, math.inf], [1.0, 1.0], "code") == [0.5, 0.5]
    assert updated([0.0, 1.0], [2.0, NAN], [1.0, 1.0], "paper") == [0.0, 1.0]


numbers = st.lists(st.tuples(st.floats(1e-6, 1), st.floats(0, 20), st.floats(0, 20)), min_size=2, max_size=7)
rules = st.sampled_from(["paper", "code"])


@settings(deadline=None)
@given(numbers, rules)
def test_weights_sum_to_one_and_none_is_lost(domains: list[tuple[float, float, float]], rule: Rule) -> None:
    weights, losses, references = zip(*domains, strict=True)
    found = updated(weights, losses, references, rule, smoothing=SMOOTHING)
    assert sum(found) == pytest.approx(1, abs=1e-12)
    assert min(found) >= SMOOTHING / len(found) * (1 - 1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0, 5), min_size=2, max_size=7), rules)
def test_of_equal_weights_the_one_with_more_excess_grows(excess: list[float], rule: Rule) -> None:
    found = updated([1.0] * len(excess), excess, [0.0] * len(excess), rule, smoothing=SMOOTHING)
    for i, one in enumerate(excess):
        for j, other in enumerate(excess):
            if one > other + 1e-9:
                assert found[i] > found[j]
            elif one == other:
                assert found[i] == found[j]


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=7), st.floats(-3, 3), rules)
def test_equal_excess_changes_nothing_but_the_smoothing(weights: list[float], excess: float, rule: Rule) -> None:
    k = len(weights)
    found = updated(weights, [excess] * k, [0.0] * k, rule, smoothing=SMOOTHING)
    before = [weight / sum(weights) for weight in weights]
    assert found == pytest.approx([(1 - SMOOTHING) * weight + SMOOTHING / k for weight in before], rel=1e-9)


def test_large_losses_do_not_overflow() -> None:
    assert updated([0.5, 0.5], [1e5, 2.0], [2.0, 2.0], "paper") == [1.0, 0.0]
    found = updated([1.0, 0.0], [2.0, 1e5], [2.0, 2.0], "code", smoothing=SMOOTHING)
    assert found == pytest.approx([1 - SMOOTHING / 2, SMOOTHING / 2])
