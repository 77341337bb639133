"""Masks against a sort, and the properties that pruning must have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.numerics import masks
from compress.numerics.masks import holds, keep_best
from compress.spec.sparsity import Sparsity


def oracle(scores: list[float], keep: int) -> list[bool]:
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
    return [i in best for i in range(len(scores))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 3))
def test_a_share_of_a_matrix_is_a_sort(rows: int, columns: int, share: float, levels: int) -> None:
    """With `levels` few values there are many ties; the earlier entry is kept."""
    scores = torch.rand(rows, columns) if not levels else torch.randint(0, levels + 1, (rows, columns)).float()
    drop = int(rows * columns * share)
    wanted = oracle(scores.flatten().tolist(), rows * columns - drop)
    found = keep_best(scores, Sparsity(fraction=share))
    assert found.flatten().tolist() == wanted
    assert holds(found, Sparsity(fraction=share))


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4"])
def test_n_of_m_is_a_sort_of_each_group(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = Sparsity.parse(text)
    scores = torch.randint(0, 5, (3, 16, 32)).float()
    found = keep_best(scores, sparsity)
    for group, mask in zip(
        scores.reshape(-1, sparsity.of or 0).tolist(), found.reshape(-1, sparsity.of or 0).tolist(), strict=True
    ):
        assert mask == oracle(group, sparsity.kept or 0)
    assert holds(found, sparsity)
    found[0, 0, :4] = True
    assert not holds(found, sparsity) or text == "4:8"
    monkeypatch.setattr(masks, "_CHUNK", 64)
    assert torch.equal(keep_best(scores, sparsity), keep_best(scores.clone(), sparsity))


def test_rows_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(2, 9, 50)
    by_row = keep_best(scores, Sparsity(fraction=0.3), per_row=True)
    assert (by_row.sum(-1) == 35).all()
    whole = keep_best(scores, Sparsity(fraction=0.3))
    assert whole.flatten(1).sum(-1).tolist() == [315, 315]
    monkeypatch.setattr(masks, "_CHUNK", 100)
    assert torch.equal(whole, keep_best(scores, Sparsity(fraction=0.3)))
    assert torch.equal(by_row, keep_best(scores, Sparsity(fraction=0.3), per_row=True))


def test_pruning_again_changes_nothing() -> None:
    w = torch.randn(8, 32)
    for sparsity in (Sparsity.parse("2:4"), Sparsity.parse("0.5")):
        once = w * keep_best(w.abs(), sparsity)
        assert torch.equal(once, once * keep_best(once.abs(), sparsity))


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        keep_best(torch.rand(2, 6), Sparsity.parse("2:4"))


@pytest.mark.parametrize("text", ["0.5", "0.125", "2:4", "4:8", "1:16"])
def test_sparsity_prints_back(text: str) -> None:
    assert str(Sparsity.parse(text)) == text


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.5", "nan", "4:2", "0:4", "2:", "2:400", "half", ""])
def test_wrong_sparsity_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="such as 2:4"):
        Sparsity.parse(text)
