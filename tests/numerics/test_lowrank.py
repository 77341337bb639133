"""Low rank: the error is the tail of the singular values, whatever the size, the split and the storage."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import lowrank
from compress.numerics.hessian import factor
from compress.numerics.lowrank import best, best_for, stored
from compress.numerics.rounding import nearest
from compress.spec.corrections import Lowrank
from compress.spec.scheme import Scheme


def lost(text: str, rows: int, columns: int) -> torch.Tensor:
    """What rounding a Gaussian matrix loses."""
    w = torch.randn(rows, columns)
    return w - nearest(w, Scheme.parse(text), torch.float32).q.dequantize()


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64), (1, 9)])
def test_the_error_is_the_tail(shape: tuple[int, int]) -> None:
    e = torch.randn(shape, dtype=torch.float64)
    s = torch.linalg.svdvals(e)
    before = float("inf")
    for rank in range(1, min(shape) + 1):
        left, right = best(e, rank)
        rest = e - left @ right
        assert float(rest.square().sum()) == pytest.approx(float(s[rank:].square().sum()), rel=1e-12, abs=1e-24)
        spectral = float(torch.linalg.svdvals(rest)[0])
        assert spectral == pytest.approx(float(s[rank]) if rank < len(s) else 0.0, rel=1e-9, abs=1e-12)
        assert spectral <= before
        before = spectral


def test_how_singular_values_are_divided_changes_nothing() -> None:
    e = torch.randn(30, 50, dtype=torch.float64)
    u, s, v = torch.linalg.svd(e, full_matrices=False)
    left, right = best(e, 5)
    torch.testing.assert_close(left @ right, (u[:, :5] * s[:5]) @ v[:5], rtol=0, atol=1e-12)


def test_int8_factors_change_the_residual_by_less_than_a_ten_thousandth() -> None:
    e = lost("w4a16g256-asym", 512, 2048)
    left, right = best(e, 8)
    norm, exact = float(e.norm()), float((e - left @ right).norm())
    for text in ("r8", "r8-int8"):
        factors = stored(left, right, Lowrank.parse(text))
        assert float((e - factors.product()).norm()) == pytest.approx(exact, rel=1e-4)
    # White noise has nearly full rank.
    assert 0.97 < exact / norm < 0.99


def test_int8_factors_are_codes_and_a_scale_for_each_rank() -> None:
    left, right = torch.randn(20, 3), torch.randn(3, 30) * torch.tensor([1.0, 100.0, 0.0])[:, None]
    found = stored(left, right, Lowrank(3, True))
    assert found.left.dtype == found.right.dtype == torch.int8
    assert found.scale is not None
    for k, scale in enumerate([left[:, k].abs().max() / 127 * (right[k].abs().max() / 127 or 1) for k in range(3)]):
        assert float(found.scale[k]) == pytest.approx(float(scale), rel=1e-5)
        wanted = left[:, k, None] * right[k]
        assert float((found.left[:, k, None].float() * found.right[k] * found.scale[k] - wanted).abs().max()) <= 0.009 * float(
            wanted.abs().max()
        )
    torch.testing.assert_close(found.product(), (found.left.float() * found.scale) @ found.right.float())
    torch.testing.assert_close(found.turned().product(), found.product().T)


def test_a_rank_that_a_matrix_has_not_is_filled_with_zeros() -> None:
    e = torch.randn(3, 8)
    found = stored(*best(e, 3), Lowrank(5))
    assert found.left.shape == (3, 5)
    assert found.right.shape == (5, 8)
    torch.testing.assert_close(found.product(), e, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("spectrum", ["rounding", "decaying", "spikes"])
def test_large_matrices_lose_no_more_than_the_exact_way(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    e = lost("w2a16g64-asym", 640, 768)
    if spectrum != "rounding":
        u, s, v = torch.linalg.svd(e, full_matrices=False)
        s = 0.9 ** torch.arange(640) if spectrum == "decaying" else s + 50 * (torch.arange(640) < 4)
        e = (u * s) @ v
    tail = float(torch.linalg.svdvals(e)[16:].square().sum())
    left, right = best(e, 16)
    assert tail * (1 - 1e-4) <= float((e - left @ right).square().sum()) <= tail * 1.002
    again = best(e, 16)
    assert torch.equal(again[0], left)
    assert torch.equal(again[1], right)
    monkeypatch.setattr(lowrank, "_EXACT", 1000)
    left, right = best(e, 16)
    assert float((e - left @ right).square().sum()) == pytest.approx(tail, rel=1e-4, abs=1e-6)


def test_weighted_factors_are_the_best_for_outputs() -> None:
    """No factors do better, by the root of H from its eigenvectors."""
    x = torch.randn(500, 24, dtype=torch.float64) * torch.linspace(0.1, 5, 24, dtype=torch.float64)
    h, e = x.T @ x / 500, torch.randn(16, 24, dtype=torch.float64)
    found = factor(h, 1e-6)
    left, right = best_for(e, 4, found.feedback * found.pivots.sqrt())
    rest, plain = e - left @ right, e - torch.mm(*best(e, 4))
    values, vectors = torch.linalg.eigh(h + found.ridge * torch.eye(24, dtype=torch.float64))
    root = vectors * values.sqrt() @ vectors.T
    tail = float(torch.linalg.svdvals(e @ root)[4:].square().sum())
    assert float((rest @ root).square().sum()) == pytest.approx(tail, rel=1e-9)
    assert float((rest @ x.T).square().sum()) < 0.9 * float((plain @ x.T).square().sum())
