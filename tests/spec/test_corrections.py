"""Corrections: the text of outliers, kept columns and factors beside codes, and of the states that have them."""

from __future__ import annotations

import pytest

from compress.errors import UsageError
from compress.spec.corrections import Columns, Lowrank, Outliers
from compress.spec.weight_state import State

STATES = [
    "dense", "masked(2:4)", "codes(w4a16g64)", "codes(w4a16g64)+masked(0.5)", "codes(w2a16g64-asym)+outliers(0.005)",
    "codes(nvfp4)+lowrank(r8-int8)", "codes(w2a16g64-asym)+outliers(0.005)+lowrank(r8)",
    "codes(w4a16g64)+masked(2:4)+outliers(0.01)", "codes(w4a4-aasym)+columns(256)", "codes(w8a8)+columns(16-int8)",
    "codes(w4a4)+outliers(0.01)+columns(16)+lowrank(r8)",
]  # fmt: skip


@pytest.mark.parametrize("text", STATES)
def test_states_print_back(text: str) -> None:
    assert str(State.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "outliers(0.1)", "lowrank(r8)", "masked(2:4)+lowrank(r8)", "dense+outliers(0.1)", "+masked(2:4)", "columns(16)"]
)
def test_other_states_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unknown state"):
        State.parse(text)


@pytest.mark.parametrize("text", ["0", "-16", "16-int4", "0.5", ""])
def test_other_numbers_of_columns_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="such as 256, or 256-int8"):
        Columns.parse(text)


@pytest.mark.parametrize("text", ["r0", "8", "r8-int4", "r-8", "r8 "])
def test_other_ranks_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Lowrank.parse(text)


def test_shares_print_back() -> None:
    for share in (0.005, 0.5, 1e-05, 0.0001):
        assert Outliers.parse(str(Outliers(share))) == Outliers(share)
    for text in ("0", "1", "1.0", "x", "-0.1"):
        with pytest.raises(UsageError):
            Outliers.parse(text)
