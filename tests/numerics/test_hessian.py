"""The Gram matrix and its factor: against float64, what damping does, and what must not pass."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import hessian
from compress.numerics.hessian import Hessian, factor


def correlated(n: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 + 0.3 * torch.eye(n, dtype=torch.float64)
    scales = torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)]
    return (torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix * scales).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [7, 1024])
def test_accumulates_the_mean_outer_product(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "_TILE", tile)
    x = correlated(40, 200, dtype=dtype)
    parts = [Hessian(40), Hessian(40)]
    for part, some in zip(parts, (x[:150], x[150:]), strict=True):
        for batch in some.split(32):
            part.add(batch)
    parts[0].matrix += parts[1].matrix
    parts[0].tokens += parts[1].tokens
    assert parts[0].tokens == 200
    mean = parts[0].mean()
    assert torch.equal(mean, mean.T)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.double().T @ x.double() / 200, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("order", ["none", "activation"])
def test_factor_multiplies_out(order: hessian.Order) -> None:
    x = correlated(50, 300, dtype=torch.float64)
    h = x.T @ x / 300
    found = factor(h, 0.02, order)
    r = found.feedback * found.pivots.sqrt()
    damped = h + 0.02 * h.diagonal().mean() * torch.eye(50, dtype=torch.float64)
    p = torch.arange(50) if found.order is None else found.order
    torch.testing.assert_close(r @ r.T, damped[p][:, p], rtol=1e-12, atol=1e-12)
    assert torch.equal(r, r.triu())
    # R is the inverse of the U of GPTQ, the upper Cholesky factor of the inverse.
    u = torch.linalg.cholesky(torch.linalg.inv(damped[p][:, p]), upper=True)
    torch.testing.assert_close(torch.linalg.inv(r), u, rtol=1e-8, atol=1e-8)
    if order == "activation":
        assert bool((h.diagonal()[p].diff() <= 0).all())


def test_damping_grows_until_it_suffices_and_says_so() -> None:
    x = correlated(30, 8)
    singular = x.T @ x
    assert factor(singular, 0.01).damping == 0.01
    assert factor(singular.double(), 0.0).damping >= 0
    indefinite = singular - 0.05 * singular.diagonal().mean() * (torch.ones(30, 30) - torch.eye(30))
    found = factor(indefinite, 0.01)
    assert found.damping > 0.01
    assert found.ridge == pytest.approx(found.damping * float(indefinite.diagonal().mean()), rel=1e-5)
    assert bool(found.feedback.isfinite().all())


def test_dead_inputs_and_no_input_at_all() -> None:
    x = correlated(20, 100)
    x[:, [3, 7]] = 0
    found = factor(x.T @ x, 0.01)
    assert found.dead.nonzero().flatten().tolist() == [3, 7]
    assert bool((found.feedback[:3, 3] == 0).all())
    nothing = factor(Hessian(20).mean(), 0.01)
    assert torch.equal(nothing.feedback, torch.eye(20))
    assert not nothing.dead.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    x = correlated(20, 100)
    x[5, 5] = value
    found = Hessian(20)
    found.add(x)
    with pytest.raises(ValueError, match="finite"):
        factor(found.mean())
    with pytest.raises(ValueError, match="finite"):
        factor(-torch.eye(4))


def test_products_of_bfloat16_are_as_exact_as_those_of_fp32() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    x = correlated(384, 2048, dtype=torch.bfloat16)
    exact = x.double().T @ x.double()
    found = Hessian(384)
    found.add(x)
    error = float((found.matrix.tril() - exact.tril()).norm() / exact.norm())
    plain = float(((x.float().T @ x.float()).double() - exact).norm() / exact.norm())
    assert error < max(2e-6, 2 * plain), "fp32 sums of exact products"
    assert torch.backends.mkldnn.matmul.fp32_precision == before, "whoever multiplies fp32 next gets fp32"
