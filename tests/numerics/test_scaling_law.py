"""The curve through three sizes of a family, against curves that are known."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.scaling_law import through

SIZES = (7e9, 13e9, 70e9)


@settings(deadline=None)
@given(st.floats(0.01, 2), st.floats(0.03, 1.5), st.floats(0, 3))
def test_it_finds_the_curve_that_the_points_are_on(a: float, b: float, c: float) -> None:
    def loss(size: float) -> float:
        return a * (size / 1e10) ** -b + c

    law = through(SIZES, list(map(loss, SIZES)))
    for size in (3.7e8, 1.3e9, 2.7e9, *SIZES):
        assert law.loss(size) == pytest.approx(loss(size), rel=1e-5)


def test_by_hand_and_in_any_order() -> None:
    """1 / N + 2 at 1, 2 and 4."""
    law = through((4, 1, 2), (2.25, 3.0, 2.5))
    assert law.loss(8) == pytest.approx(2.125)
    assert (law.b, law.c) == (pytest.approx(1), pytest.approx(2))


@pytest.mark.parametrize(
    ("sizes", "losses", "said"),
    [
        ((1, 2), (2, 1), "three sizes with a loss each, not 2 with 2"),
        ((1, 2, 3), (2, 1), "not 3 with 2"),
        ((1, 1, 3), (3, 2, 1), "three different sizes above 0"),
        ((0, 1, 3), (3, 2, 1), "three different sizes above 0"),
        ((1, 2, 3), (1, 2, 3), "losses that fall as models grow"),
        ((1, 2, 4), (3, 2, 1), "this one does not flatten"),
        ((1, 2, 4), (3, 1, 1 - 1e-40), "losses that fall"),
        ((1, 2, 4), (3e30, 1, 0), "this one flattens too fast"),
    ],
)
def test_points_without_a_curve_are_refused(sizes: tuple[float, ...], losses: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        through(sizes, losses)
