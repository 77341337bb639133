"""Scales of float grids: published signal-to-noise, exponents by hand, and the laws of each kind of scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics.floats import decode, encode, top
from compress.numerics.rounding import nearest
from compress.numerics.scales import spread, steps
from compress.spec.scheme import Scheme

TEXTS = [
    "nf4g64", "nf2g32", "nf3", "iq4_nl", "fp4g32", "fp4g32-m1", "fp4g32-m2", "fp4g32-m2-ceil", "e3m0g64", "fp8", "fp8-e5m2", "fp8-tensor",
    "fp8-block", "mxfp4", "mxfp4-floor", "mxfp4-even", "mxfp4-mse", "nvfp4", "nvfp4-4over6",
]  # fmt: skip
SQNR = {
    "mxfp4-floor": (18.79, 17.96, 17.64), "mxfp4": (18.75, 17.59, 17.13), "mxfp4-even": (19.03, 18.16, 17.79),
    "mxfp4-mse": (19.05, 18.24, 17.90), "nvfp4": (20.43, 20.66, 20.74), "nvfp4-4over6": (21.20, 21.20, 21.21),
    "fp4g32": (19.90, 19.79, 19.71), "fp4g128": (19.26, 18.35, 17.55), "fp4g256": (19.07, 17.78, 16.39),
    "nf4g64": (20.73, 19.70, 19.06), "iq4_nl": (22.01, 20.89, 20.42), "e3m0g256": (14.22, 14.44, 14.71),
}  # fmt: skip


@pytest.fixture(scope="module")
def noises() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((1024, 1024))
    return torch.randn(1024, 1024), laplace, torch.distributions.StudentT(4.0).sample((1024, 1024))


def decibel(w: torch.Tensor, text: str) -> float:
    found = nearest(w, Scheme.parse(text), torch.float32)
    return 10 * math.log10(found.squared_norm / found.squared_error)


@pytest.mark.parametrize("text", SQNR)
def test_signal_to_noise(text: str, noises: tuple[torch.Tensor, ...]) -> None:
    assert [decibel(w, text) for w in noises] == pytest.approx(SQNR[text], abs=0.1)


def test_signal_to_noise_of_bound_scales(noises: tuple[torch.Tensor, ...]) -> None:
    assert decibel(noises[0], "fp4g256-m1") == pytest.approx(18.95, abs=0.1)
    assert decibel(noises[0], "fp4g256-m1-ceil") == pytest.approx(17.46, abs=0.1)
    # Nearest powers lose less than the next ones, and fewer scales bound to each other less than many.
    assert 18.4 < decibel(noises[0], "fp4g256-m2") < 19.07
    assert decibel(noises[0], "fp4g256-m2-ceil") < decibel(noises[0], "fp4g256-m2") - 1


def slow(w: torch.Tensor, scheme: Scheme, scale: torch.Tensor, tensor_scale: torch.Tensor | None) -> torch.Tensor:
    """Every weight to the value nearest to it, one by one, given what the scales mean."""
    table = decode(torch.arange(scheme.levels, dtype=torch.int32).to(torch.uint8), scheme)
    table = table[table.isfinite()]
    s = spread(steps(scale, tensor_scale), scheme, *w.shape)
    best = (w[..., None].double() / s[..., None] - table).abs().argmin(-1)
    return table[best] * s


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_takes_the_nearest_value(text: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(text)
    w = (torch.randn(6, 200, generator=torch.Generator().manual_seed(3)) / 7).to(dtype)
    w[2] = 0
    q, lost, norm = nearest(w, scheme, dtype)
    found, theirs = q.dequantize(), slow(w, scheme, q.scale, q.tensor_scale)
    assert torch.allclose((found - w.float()).abs(), (theirs - w.float()).abs(), atol=1e-6, rtol=1e-4)
    assert lost == pytest.approx(float((found - w).double().square().sum()), rel=1e-4)
    assert norm == pytest.approx(float(w.double().square().sum()), rel=1e-4)
    assert not bool(found[2].any())
    assert bool(steps(q.scale, q.tensor_scale).isfinite().all())


@pytest.mark.parametrize("text", TEXTS)
def test_what_was_rounded_rounds_to_itself_under_its_scales(text: str) -> None:
    scheme = Scheme.parse(text)
    q = nearest(torch.randn(8, 128), scheme, torch.float32).q
    s = spread(q.steps(), scheme, 8, 128)
    assert torch.equal(encode(q.dequantize() / s, scheme), q.codes)


@pytest.mark.parametrize("text", [t for t in TEXTS if not t.startswith("nf")])
def test_rounding_is_odd(text: str) -> None:
    w, scheme = torch.randn(8, 128), Scheme.parse(text)
    a, b = (nearest(x, scheme, torch.bfloat16).q for x in (w, -w))
    assert torch.equal(a.dequantize(), -b.dequantize())


@settings(max_examples=30, deadline=None)
@given(st.integers(-12, 12), st.sampled_from([t for t in TEXTS if "e5m2" not in t]))
def test_scaling_by_a_power_of_two_scales_the_result(power: int, text: str) -> None:
    w, scheme = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)), Scheme.parse(text)
    a, b = (nearest(x, scheme, torch.float32).q for x in (w, w * 2.0**power))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.dequantize() * 2.0**power, b.dequantize())


def test_nvfp4_does_not_depend_on_the_size_of_the_matrix_weights() -> None:
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    a, b = (nearest(w * c, Scheme.parse("nvfp4"), torch.float32).q for c in (1.0, 0.0123))
    assert float((a.codes == b.codes).float().mean()) > 0.999
    assert torch.allclose(a.dequantize() * 0.0123, b.dequantize(), rtol=1e-5, atol=1e-3 * 0.0123)


@pytest.mark.parametrize("rule", ["rceil", "floor", "even"])
def test_powers_of_two_around_every_boundary(rule: str) -> None:
    scheme = Scheme.parse(f"mxfp4-{rule}")
    peaks = [m * 2.0**e for e in (-126, -30, 0, 1, 100) for m in (1.0, 1.25, 1.5, 1.5000001, 1.7499999, 1.75, 1.9999999)]
    w = torch.zeros(len(peaks), 32)
    w[:, 5] = torch.tensor(peaks)
    for found, peak in zip(nearest(w, scheme, torch.float32).q.scale.flatten().tolist(), w[:, 5].tolist(), strict=True):
        mantissa, exponent = math.frexp(peak)  # peak = mantissa * 2^exponent, .5 <= mantissa < 1
        e = exponent - 1 - 2 + {"floor": 0, "even": mantissa >= 0.875, "rceil": mantissa > 0.75}[rule]
        assert found == max(0, min(254, e + 127)), peak
        if rule == "rceil" and found:
            assert peak / 2.0 ** (found - 127) <= 6


def test_what_is_not_finite_makes_its_own_block_nan() -> None:
    for bad in (float("nan"), float("inf")):
        w = torch.randn(2, 64)
        w[0, 3] = bad
        q = nearest(w, Scheme.parse("mxfp4"), torch.float32).q
        assert q.scale.tolist()[0][0] == 255
        assert q.dequantize().isnan().sum(-1).tolist() == [32, 0]


@pytest.mark.parametrize("text", ["fp4g32-m1", "fp4g32-m1-ceil", "fp4g32-m2", "fp4g32-m2-ceil"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bound_scales_are_powers_of_two_apart(text: str, dtype: torch.dtype) -> None:
    w = (torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0, 256)).to(dtype)
    scale = nearest(w, Scheme.parse(text), dtype).q.scale.float()
    shifts = (scale.amax(-1, keepdim=True) / scale).log2()
    assert torch.equal(shifts, shifts.round())
    assert 0 <= float(shifts.min()) <= float(shifts.max()) <= 8
    free = nearest(w, Scheme.parse("fp4g32"), dtype).q.scale.float()
    if "m1" in text:
        assert torch.equal(scale.log2(), scale.log2().round())
    else:
        assert torch.equal(scale.amax(-1), free.amax(-1))
    if text.endswith("m1-ceil"):
        assert bool((scale >= free).all())
    if text.endswith("m2-ceil"):
        assert bool((scale <= free)[shifts < 8].all())
    # Shifted values of the grid are FP8 numbers, so that a row is FP8 with one scale.
    shifted = decode(torch.arange(16, dtype=torch.uint8), Scheme.parse(text)) * 2.0 ** -shifts[..., None]
    assert torch.equal(shifted.to(torch.float8_e4m3fn).float(), shifted)


@pytest.mark.parametrize("text", TEXTS)
def test_a_search_never_loses(text: str) -> None:
    w, scheme = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).pow(3), Scheme.parse(text)
    plain, searched = (nearest(w, scheme, torch.bfloat16, clip) for clip in ("none", "mse"))
    assert searched.squared_error <= plain.squared_error * (1 + 1e-6)
    if scheme.bits < 8:
        assert searched.squared_error < plain.squared_error or text in ("mxfp4-mse",)
    else:
        assert torch.equal(searched.q.codes, plain.q.codes)


def test_a_block_errs_by_half_a_step_at_most() -> None:
    w, scheme = torch.randn(16, 256), Scheme.parse("mxfp4")
    q = nearest(w, scheme, torch.float32).q
    x = w / spread(q.steps(), scheme, 16, 256)
    # The steps of E2M1: a half up to 2, one up to 4, two up to 6; rceil clips nothing.
    half = torch.where(x.abs() <= 2, 0.25, torch.where(x.abs() <= 4, 0.5, 1.0))
    assert bool(((decode(q.codes, scheme) - x).abs() <= half).all())
    assert float(x.abs().max()) <= top(scheme)


def test_a_peak_of_more_than_the_matrix_is_kept() -> None:
    w = torch.randn(8, 64)
    for text in ("nvfp4", "fp8-tensor"):
        alone, shared = (nearest(w, Scheme.parse(text), torch.float32, peak=peak).q for peak in (None, 100.0))
        whole = [q.scale if q.tensor_scale is None else 1 / q.tensor_scale for q in (alone, shared)]
        assert float(whole[1].flatten()[0] / whole[0].flatten()[0]) == pytest.approx(100 / float(w.abs().max()), rel=1e-4)


def test_experts_are_rounded_one_by_one() -> None:
    w = torch.randn(3, 40, 64) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    for text in ("nvfp4", "fp8-tensor", "fp8-block", "mxfp4", "nf4g32", "w4a16g32"):
        whole, scheme = nearest(w, Scheme.parse(text), torch.bfloat16).q, Scheme.parse(text)
        for e, each in enumerate(nearest(expert, scheme, torch.bfloat16).q for expert in w):
            assert torch.equal(whole.codes[e], each.codes)
            assert torch.equal(whole.dequantize()[e], each.dequantize())


def test_extreme_magnitudes_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        info = torch.finfo(dtype)
        w = torch.tensor([[info.max / 2, -info.max / 2, 0, 1] * 16, [info.tiny, -info.tiny, 0, 0] * 16, [0.0] * 64]).to(dtype)
        for text in TEXTS:
            q = nearest(w, Scheme.parse(text), dtype).q
            assert bool(q.dequantize().isfinite().all()), (text, dtype)
            assert not bool(q.dequantize()[2].any())
