"""Output feedback: rows that make up for rows before them, against least squares; what it gains over rows alone."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import output_feedback
from compress.numerics.gptq import Settings, solve
from compress.numerics.hessian import Hessian, factor
from compress.numerics.output_feedback import OutputGrams, blocks, gram_numbers, round_in_turn, segments
from compress.numerics.qtensor import integers
from compress.spec.scheme import Scheme

DAMPING = 0.05


def correlated(rows: int, seed: int = 0, tokens: int = 600) -> torch.Tensor:
    """Vectors [tokens, rows] with a few directions in common."""
    made = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 6, generator=made) @ torch.randn(6, rows, generator=made)
    return shared + 0.4 * torch.randn(tokens, rows, generator=made)


def gram(rows: int, seed: int = 0) -> torch.Tensor:
    held = OutputGrams(rows)
    for part in correlated(rows, seed).split(100):
        held.add(part)
    return torch.block_diag(*held.means())


def damped(g: torch.Tensor) -> torch.Tensor:
    return g.double() + DAMPING * float(g.diagonal().mean()) * torch.eye(len(g), dtype=torch.float64)


@pytest.mark.parametrize(("size", "rows"), [(1, 12), (5, 12), (32, 70)])
def test_a_block_aims_at_the_least_loss_that_is_left(size: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the errors before it; all rows after it are free. By a linear system in fp64, whatever the inputs."""
    monkeypatch.setattr(output_feedback, "BLOCK", size)
    monkeypatch.setattr(output_feedback, "PARTS", 1000)
    w, g = torch.randn(rows, 24), gram(rows)
    whole, d, seen = damped(g), torch.empty(rows, 24, dtype=torch.float64), 0

    def rounded(aim: torch.Tensor, part: slice) -> torch.Tensor:
        nonlocal seen
        assert (part.start, part.stop) == (seen, min(rows, seen + size))
        done, rest = slice(0, seen), slice(seen, rows)
        free = -torch.linalg.solve(whole[rest, rest], whole[rest, done] @ d[done])
        wanted = w[rest].double() - free
        torch.testing.assert_close(aim.double(), wanted[: len(aim)], rtol=1e-4, atol=1e-4)
        q = (aim * 2).round() / 2
        d[part] = w[part].double() - q.double()
        seen = part.stop
        return q

    round_in_turn(w, [g], DAMPING, rounded)
    assert seen == rows


def test_segments_have_matrices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_feedback, "SEGMENT", 40)
    held, x, w = OutputGrams(100), correlated(100), torch.randn(100, 16)
    held.add(x)
    means = held.means()
    assert [len(mean) for mean in means] == [40, 40, 20]
    assert gram_numbers(100) == 2 * 1600 + 400
    for part, mean in zip(segments(100), means, strict=True):
        torch.testing.assert_close(mean.double(), (x[:, part].double().T @ x[:, part].double()) / len(x), rtol=1e-5, atol=1e-5)
    aims, order = torch.empty_like(w), []

    def rounded(aim: torch.Tensor, part: slice) -> torch.Tensor:
        aims[part] = aim
        order.append(part)
        return aim.round()

    round_in_turn(w, means, DAMPING, rounded)
    for part in segments(100):
        # The first rows of a segment have nobody to make up for.
        first = next(one for one in order if one.start == part.start)
        assert torch.equal(aims[first], w[first])


def test_outputs_that_are_alike_or_without_gradients_change_nothing() -> None:
    w = torch.randn(64, 16)
    for g in (torch.eye(64), torch.zeros(64, 64)):
        round_in_turn(w, [g], DAMPING, lambda aim, part: torch.testing.assert_close(aim, w[part]) or aim.round())


def test_many_rows_are_rounded_in_few_blocks() -> None:
    assert [part.stop - part.start for part in blocks(70)] == [32, 32, 6]
    assert len(list(blocks(4096))) == 32


@pytest.mark.parametrize("text", ["w3a16g32", "w2a16g16-asym", "nf4g32", "mxfp4"])
def test_the_loss_of_both_kinds_of_feedback_is_least(text: str) -> None:
    """trace(G D H D^T) of GPTQ row by row, and with rows in turn."""
    scheme, rows, n = Scheme.parse(text), 192, 128
    w, statistic = torch.randn(rows, n), Hessian(n)
    statistic.add(correlated(n, 1))
    hessian, g = statistic.mean(), gram(rows)
    factored, settings = factor(hessian.clone(), 0.01, "activation"), Settings()

    def values(part: torch.Tensor, _: slice = slice(None)) -> torch.Tensor:
        found = solve(part, factored, hessian, scheme, torch.float32, settings)
        return integers(scheme, found.codes, found.scale, found.zero).dequantize()

    in_turn = torch.empty_like(w)

    def rounded(aim: torch.Tensor, part: slice) -> torch.Tensor:
        in_turn[part] = values(aim)
        return in_turn[part]

    round_in_turn(w, [g.clone()], 0.01, rounded)

    def loss(q: torch.Tensor) -> float:
        d = (w - q).double()
        return float(((g.double() @ d) * (d @ hessian.double())).sum())

    assert loss(in_turn) < 0.6 * loss(values(w))
