"""Kept parts: their text, and what is kept of what was kept before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.spec.kept import MLP, Kept, KeptBlock, Sizes, numbers_of, text_of

SIZES = Sizes(layers=4, hidden=8, queries=4, groups=2, head=2, units=6, experts=0)


@given(st.lists(st.integers(0, 50)))
def test_numbers_and_their_ranges(numbers: list[int]) -> None:
    assert numbers_of(text_of(numbers)) == tuple(numbers)


def test_ranges_are_short() -> None:
    assert text_of([0, 1, 2, 3, 7, 5]) == "0-3,7,5"
    assert text_of([]) == ""


@pytest.mark.parametrize("text", ["1-", "a", "1,,2", "-1", "0-99999999", 7])
def test_what_is_no_range_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="range"):
        numbers_of(text)  # type: ignore[arg-type]


def test_what_is_kept_of_what_was_kept() -> None:
    first = Kept((0, 2, 3), (0, 1, 4, 5, 6), (KeptBlock((1,), (2, 3), {MLP: (5, 0, 3)}),) * 3)
    second = Kept((0, 2), (4, 1), (KeptBlock((0,), (1,), {MLP: (2, 0)}),) * 2)
    both = second.of(first)
    assert both == Kept((0, 3), (6, 1), (KeptBlock((1,), (3,), {MLP: (3, 5)}),) * 2)


def test_experts_keep_their_numbers_of_the_source() -> None:
    first = Kept((0,), (0,), (KeptBlock((0,), (0,), {"1": (4, 5), "3": (6, 7)}, (1, 3)),))
    second = Kept((0,), (0,), (KeptBlock((0,), (0,), {"1": (0,)}, (1,)),))
    assert second.of(first).blocks[0] == KeptBlock((0,), (0,), {"3": (6,)}, (3,))


def test_all_of_a_model_goes_through_json() -> None:
    kept = Kept.first(SIZES, SIZES)
    assert Kept.from_json(kept.to_json()) == kept
    assert kept.of(kept) == kept
    with pytest.raises(ValueError, match="blocks"):
        Kept.from_json({"layers": "0", "hidden": "0"})
    with pytest.raises(ValueError, match="2 layers, but 4 blocks"):
        Kept.from_json({**kept.to_json(), "layers": "0-1"})


def test_changes_in_words() -> None:
    assert SIZES.changes(Sizes(3, 8, 2, 1, 2, 6)) == "layers 4 -> 3, heads 4 -> 2, kv_heads 2 -> 1"
