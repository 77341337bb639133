"""Kept columns: what the errors of all others make of them, and the zero point's algebra."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.columns import KeptColumns, PeakedHessian, kept_columns, split
from compress.numerics.gptq import solve
from compress.numerics.gptq_task import Settings
from compress.numerics.hessian import Hessian, prepare
from compress.numerics.inputs import InputRounding, in_integers, rounded_inputs
from compress.numerics.qtensor import integers
from compress.spec.corrections import Columns
from compress.spec.scheme import Scheme

SCHEME, WIDTH = Scheme.parse("w4a4-aasym"), 64
SETTINGS = Settings("mse", True, 0, 1)


def inputs(tokens: int = 400, loud: tuple[int, ...] = (3, 17, 40)) -> torch.Tensor:
    """Correlated inputs, some of which are far larger than the others."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, WIDTH, generator=chance) @ torch.randn(WIDTH, WIDTH, generator=chance) / WIDTH**0.5
    x[:, list(loud)] *= 40
    return x


def weights(rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def statistic(x: torch.Tensor) -> PeakedHessian:
    found = PeakedHessian(x.shape[1])
    for batch in x.split(100):
        found.add(batch)
    return found


def solved(
    x: torch.Tensor, keep: int, order: str = "activation", sweeps: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes' values without kept columns, the weight in all, kept columns)."""
    shared, w = split(statistic(x), keep, 0.01, order, 0), weights()  # type: ignore[arg-type]
    found = solve(w, shared.factor, shared.rest, SCHEME, torch.float32, Settings("mse", True, 0, sweeps))
    coded = integers(SCHEME, found.codes, found.scale, found.zero).dequantize()
    best = w[:, shared.kept] + (w - coded) @ shared.carry
    return coded, kept_columns(best, shared.kept, torch.float32, False).put(coded), shared.kept


def test_the_loudest_inputs_are_kept() -> None:
    kept = split(statistic(inputs()), 3, 0.01, "none", 0).kept
    assert kept.tolist() == [3, 17, 40]
    coded, _, _ = solved(inputs(), 16)
    assert not bool(coded[:, kept].any())


@pytest.mark.parametrize("order", ["activation", "none"])
def test_kept_columns_are_those_that_a_slow_loop_of_gptq_leaves(order: str) -> None:
    """With kept columns last in its order, GPTQ by its formula moves them to the same values."""
    x, w = inputs(), weights()
    coded, whole, kept = solved(x, 16, order, sweeps=0)
    h = (x.double().T @ x.double()) / len(x)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    rest = [k for k in range(WIDTH) if k not in set(kept.tolist())]
    turn = rest + kept.tolist()
    upper = torch.linalg.cholesky(torch.linalg.inv(h[turn][:, turn]), upper=True)
    target = w.double()[:, turn]
    for k in range(len(rest)):
        error = (target[:, k] - coded.double()[:, turn[k]]) / upper[k, k]
        # The codes are given: only what they do to later columns is computed here.
        target[:, k:] -= error[:, None] * upper[k, k:]
    torch.testing.assert_close(whole[:, kept].double(), target[:, len(rest) :], rtol=2e-3, atol=2e-3)


def test_they_are_the_best_for_these_codes() -> None:
    x = inputs()
    _, whole, kept = solved(x, 16)
    h = (x.double().T @ x.double()) / len(x)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    slope = (weights().double() - whole.double()) @ h
    assert float(slope[:, kept].abs().max()) < 1e-3 * float(h.diagonal().max())


def test_without_kept_columns_it_is_plain_gptq() -> None:
    x, w = inputs(), weights()
    coded, whole, kept = solved(x, 0)
    plain = Hessian(WIDTH)
    plain.add(x)
    shared = prepare(plain, 0.01, "activation", 0, "")
    found = solve(w, shared.factor, shared.hessian, SCHEME, torch.float32, SETTINGS)
    theirs = integers(SCHEME, found.codes, found.scale, found.zero).dequantize()
    assert not len(kept)
    assert torch.equal(whole, coded)
    assert torch.equal(coded, theirs)


def test_more_kept_columns_lose_less() -> None:
    x, w = inputs(), weights()
    lost = [float(((w - solved(x, keep)[1]) @ x.T).norm()) for keep in (0, 16, 32, 48)]
    assert lost == sorted(lost, reverse=True)
    assert lost[1] < 0.8 * lost[0]


def test_rounding_ranges_are_those_of_the_other_inputs() -> None:
    x = inputs(10)
    how = InputRounding(SCHEME, None, torch.tensor([3, 17, 40], dtype=torch.int32))
    found, kept = how(x), torch.zeros(WIDTH, dtype=torch.bool)
    kept[[3, 17, 40]] = True
    assert torch.equal(found[:, kept], x[:, kept])
    assert torch.equal(found[:, ~kept], rounded_inputs(x[:, ~kept], SCHEME))
    assert float((found - x).norm()) < 0.2 * float((rounded_inputs(x, SCHEME) - x).norm())
    int8 = InputRounding(SCHEME, None, how.columns, True)(x)
    assert torch.equal(int8[:, kept], rounded_inputs(x[:, kept], Scheme.parse("w8a8")))
    assert torch.equal(int8[:, ~kept], found[:, ~kept])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_zero_point_comes_out_of_the_product(bits: int) -> None:
    """s t (sum q c - z sum c) is the product of s (q - z) and t c; all of q fits in a signed integer of these bits."""
    x, codes = inputs(20).double(), torch.randint(-8, 8, (5, WIDTH), generator=torch.Generator().manual_seed(2))
    q, s, z = in_integers(x, bits, True)
    assert z is not None
    assert int(q.min()) >= -(1 << (bits - 1))
    assert int(q.max()) < 1 << (bits - 1)
    product = (q.long() @ codes.T) - z.long() * codes.sum(1)
    torch.testing.assert_close(product * s, ((q - z) * s) @ codes.T.double(), rtol=1e-12, atol=1e-12)


def test_int8_columns_have_a_scale_per_row() -> None:
    w = weights() * torch.logspace(-3, 3, 24)[:, None]
    found = kept_columns(w, torch.arange(WIDTH), torch.float32, True)
    assert found.scale is not None
    assert float(((found.dense() - w) / found.scale).abs().max()) <= 0.501
    part = found.take(torch.tensor([5, 2]))
    assert torch.equal(part.dense(), found.dense()[[5, 2]])
    assert isinstance(part, KeptColumns)


@pytest.mark.parametrize(("outliers", "width", "count"), [(0.0625, 4096, 256), (0.0625, 14336, 896), (0.0625, 576, 48), (0.0, 64, 0), (256, 4096, 256), (100, 4096, 112), (1, 64, 16)])  # fmt: skip
def test_how_many_are_kept(outliers: float, width: int, count: int) -> None:
    assert Columns.count_of(outliers, width) == count
