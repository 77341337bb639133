"""GPTQ on grids of floats: its identity, what it is on uncorrelated inputs, and what each step gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.numerics.gptq import Solved, solve
from compress.numerics.gptq_task import Along, Settings
from compress.numerics.hessian import factor
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from support import shared

PLAIN: dict[str, Any] = {"clip": "none", "sweeps": 0}
TEXTS = [
    "nf4g64", "nf2g32", "nf3", "iq4_nl", "fp4g32", "fp4g48-m1", "fp4g64-m2", "e3m0g64", "fp8", "fp8-e5m2", "fp8-tensor", "fp8-block",
    "mxfp4", "mxfp4-mse", "nvfp4", "nvfp4-4over6",
]  # fmt: skip


def problem(rows: int = 144, n: int = 160, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, n] and the H [n, n] of correlated inputs."""
    generator = torch.Generator().manual_seed(rows + n)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 + 0.3 * torch.eye(n, dtype=torch.float64)
    scales = torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)]
    x = torch.randn(600, n, generator=generator, dtype=torch.float64) @ mix * scales
    w = torch.randn(rows, n, generator=generator, dtype=torch.float64) * 0.02
    return w.to(dtype), (x.T @ x / 600).to(dtype)


def dense_view(found: Solved, scheme: Scheme, along: Along) -> torch.Tensor:
    """Q [rows, n]."""
    q = QTensor(scheme, found.codes, found.scale, found.zero, found.tensor_scale).dequantize().double()
    return q if along == "inputs" else q.T


def stored(w: torch.Tensor, along: Along) -> torch.Tensor:
    return w if along == "inputs" else w.T


def loss(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> float:
    d = w.double() - q
    return float((d @ h.double() * d).sum())


@pytest.mark.parametrize(("text", "along", "order"), shared(TEXTS, ["inputs", "outputs"], ["none", "activation"]))
def test_losses_are_exact(text: str, along: Along, order: Any) -> None:
    (w, h), scheme = problem(), Scheme.parse(text)
    f = factor(h, 0.05, order)
    damped = h + f.ridge * torch.eye(len(h))
    for options in (PLAIN, {"sweeps": 0}, {"sweeps": 2}):
        found = solve(w, f, h, scheme, torch.float32, Settings(along=along, **options))
        q = dense_view(found, scheme, along)
        if not options.get("sweeps"):
            assert found.identity == pytest.approx(loss(w, q, damped), rel=1e-5)
        assert found.loss == pytest.approx(loss(w, q, h), rel=1e-5)
        assert float(found.errors.sum()) == pytest.approx(float((w - q).square().sum()), rel=1e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_uncorrelated_inputs_make_it_rounding_to_nearest(text: str, along: Along) -> None:
    (w, _), scheme, h = problem(dtype=torch.float32), Scheme.parse(text), 3.7 * torch.eye(160)
    rtn = nearest(stored(w, along), scheme, torch.bfloat16, "none").q
    found = solve(w, factor(h), h, scheme, torch.bfloat16, Settings(along=along, clip="none", sweeps=0))
    assert torch.equal(found.codes, rtn.codes)
    assert torch.equal(found.scale.view(torch.uint8), rtn.scale.view(torch.uint8))
    assert (found.tensor_scale is None) == (rtn.tensor_scale is None)
    assert found.tensor_scale is None or torch.equal(found.tensor_scale, rtn.tensor_scale)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_each_step_pays(text: str, along: Along) -> None:
    (w, h), scheme = problem(dtype=torch.float32), Scheme.parse(text)
    rtn = nearest(stored(w, along), scheme, torch.bfloat16).q.dequantize()
    losses = [loss(w, stored(rtn, along), h)]
    f = factor(h)
    for sweeps in (0, 1, 3):
        losses.append(solve(w, f, h, scheme, torch.bfloat16, Settings(clip="none", sweeps=sweeps, along=along)).loss)
    assert losses[1] < 0.8 * losses[0]
    assert losses[3] <= losses[2] < losses[1]


@pytest.mark.parametrize("text", [text for text in TEXTS if not Scheme.parse(text).zeroless])
@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_masked_weights_and_dead_inputs_are_zero(text: str, along: Along) -> None:
    (w, h), scheme = problem(dtype=torch.float32), Scheme.parse(text)
    h[[5, 77]] = 0
    h[:, [5, 77]] = 0
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = solve(w * mask, factor(h, 0.01, "activation"), h, scheme, torch.bfloat16, Settings(along=along), mask=mask)
    q = dense_view(found, scheme, along)
    assert not bool(q[~mask].any())
    assert not bool(q[:, [5, 77]].any())
    assert bool(q[mask].any())
    assert not bool(q[~mask].signbit().any())


def test_a_shared_peak_and_rows_in_parts() -> None:
    (w, h), scheme = problem(dtype=torch.float32), Scheme.parse("nvfp4")
    f, peak = factor(h), float(w.abs().max())
    whole = solve(w, f, h, scheme, torch.bfloat16, peak=peak)
    parts = [solve(rows, f, h, scheme, torch.bfloat16, peak=peak) for rows in w.split(50)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert all(part.tensor_scale == whole.tensor_scale for part in parts)
