"""Scheme: the grammar parses, prints back, and refuses in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.scheme import BITS, Scheme


@given(st.sampled_from(BITS), st.none() | st.integers(8, 4096), st.booleans())
def test_text_round_trips(bits: int, group: int | None, symmetric: bool) -> None:
    scheme = Scheme(bits, group, symmetric)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("text", ["w4a16g128", "w3a16g64-asym", "w8a16", "w2a16-asym"])
def test_known_spellings_print_back(text: str) -> None:
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w5a16", "2, 3, 4, 8"),
        ("w4a8", "a16"),
        ("w4", "w4a16g128"),
        ("w4a16g4", "at least 8"),
        ("W4A16", "w4a16g128"),
        ("", "w4a16"),
    ],
)
def test_wrong_text_is_refused_with_what_would_do(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Scheme.parse(text)


def test_groups_count_a_ragged_last_one() -> None:
    assert Scheme(4, 64).groups(172) == 3
    assert Scheme(4).groups(172) == 1
