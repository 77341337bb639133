"""Importance scores against the formula written out, and the least-squares refit against lstsq."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.importance import Importance, best, best_queries, by_head
from compress.numerics.output_fit import OutputFit

CPU = torch.device("cpu")


def test_scores_are_the_root_of_squares_of_means_whatever_the_order_of_batches() -> None:
    a = torch.randn(6, 5, 8)
    oracle = (a.abs().double().mean(1) ** 2).sum(0).sqrt()
    for parts in ([a], [a[4:], a[:4]]):
        sums = Importance(8, CPU)
        for part in parts:
            sample = torch.arange(len(part)).repeat_interleave(5)
            sums.add(part.reshape(-1, 8), sample, len(part))
        torch.testing.assert_close(sums.scores(), oracle)


def test_tokens_that_do_not_count_do_not_count() -> None:
    a, valid = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    sums = Importance(3, CPU)
    rows = valid.flatten().nonzero()[:, 0]
    sums.add(a.reshape(-1, 3)[rows], rows // 4, 2)
    oracle = (a[0, :2].abs().double().mean(0) ** 2 + a[1].abs().double().mean(0) ** 2).sqrt()
    torch.testing.assert_close(sums.scores(), oracle)


def test_infinite_activations_are_told() -> None:
    sums = Importance(2, CPU)
    sums.add(torch.tensor([[1.0, torch.inf]]), torch.zeros(1, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="finite"):
        sums.scores()


def test_best_of_heads() -> None:
    assert by_head(torch.tensor([3.0, 4.0, 0.0, 1.0]), 2).tolist() == [5.0, 1.0]
    assert best(torch.tensor([1.0, 5.0, 5.0, 2.0]), 2) == (1, 2)
    assert best_queries(torch.tensor([1.0, 2.0, 9.0, 0.0, 4.0, 3.0]), (0, 2), 2, 1) == (1, 4)


def test_refit_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    w, kept = torch.randn(7, 12, generator=generator), torch.tensor([0, 2, 3, 5, 8, 11])
    new, before, after = OutputFit(x.T @ x / len(x), kept, damp=1e-9)(w)
    oracle = torch.linalg.lstsq(x[:, kept].double(), (x @ w.T).double()).solution.T
    torch.testing.assert_close(new.double(), oracle, rtol=1e-3, atol=1e-3)
    lost = (x @ w.T - x[:, kept] @ new.T).norm() / (x @ w.T).norm()
    assert after == pytest.approx(float(lost), rel=1e-3)
    assert after < before


def test_a_refit_never_costs_more_than_it_gains() -> None:
    w = torch.randn(3, 4)
    new, before, after = OutputFit(torch.eye(4), torch.tensor([0, 1]))(w)
    assert after <= before
    torch.testing.assert_close(new, w[:, :2], rtol=1e-3, atol=1e-3)
