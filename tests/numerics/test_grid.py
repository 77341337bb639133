"""Integer grids against an element-by-element oracle, and the properties that rounding must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.numerics import grid
from compress.numerics.grid import dequantize, round_to_nearest
from compress.spec.scheme import Scheme

SCHEMES = [
    "w2a16g32",
    "w3a16g32",
    "w4a16g32",
    "w8a16g32",
    "w4a16",
    "w2a16g32-asym",
    "w3a16g32-asym",
    "w4a16g32-asym",
    "w8a16-asym",
    "w5a16g32",
    "w6a16g32-asym",
]
MINIMA = ["w2a16g32-min", "w4a16g32-min", "w5a16g32-min", "w8a16-min"]


def oracle(row: list[float], scheme: Scheme, dtype: torch.dtype) -> tuple[list[int], list[float], list[int]]:
    """One row, one group at a time, in float64 apart from the scale's stored dtype."""
    group, top = scheme.group or len(row), scheme.levels - 1
    codes, scales, zeros = [], [], []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        low, high = min(part), max(part)
        span = 2 * max(-low, high) / top if scheme.symmetric else (max(high, 0) - min(low, 0)) / top
        s = float(torch.tensor(span or 1.0, dtype=torch.float32).to(dtype))
        z = scheme.middle if scheme.symmetric else min(max(round(-min(low, 0) / s), 0), top)
        scales.append(s)
        zeros.append(z)
        codes += [min(max(round(w / s) + z, 0), top) for w in part]
    return codes, scales, zeros


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_equals_the_oracle(text: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(text)
    w = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    w[2] = 0
    found = round_to_nearest(w, scheme, dtype)
    z = found.zero if found.zero is not None else torch.full_like(found.scale, scheme.middle, dtype=torch.uint8)
    group = scheme.group or 96
    for r in range(6):
        codes, scales, zeros = oracle(w[r].double().tolist(), scheme, dtype)
        assert found.scale[r].tolist() == pytest.approx(scales, rel=2e-7 if dtype == torch.float32 else 0, abs=0)
        assert z[r].tolist() == zeros
        for c, (mine, theirs) in enumerate(zip(found.codes[r].tolist(), codes, strict=True)):
            # The largest weight of a symmetric group lies on a tie by construction; fp32 may take the other side.
            fraction = abs(float(w[r, c]) / scales[c // group]) % 1
            assert mine == theirs or (abs(mine - theirs) == 1 and abs(fraction - 0.5) < 1e-5)
    assert found.scale.dtype == dtype
    assert dequantize(found.codes, found.scale, found.zero, scheme)[2].abs().max() == 0


def test_chunks_and_ragged_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(50, 172)
    whole = round_to_nearest(w, Scheme.parse("w3a16g64"), torch.float32)
    monkeypatch.setattr(grid, "_CHUNK", 400)
    parts = round_to_nearest(w, Scheme.parse("w3a16g64"), torch.float32)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert whole.scale.shape == (50, 3)
    tail = round_to_nearest(w[:, 128:].contiguous(), Scheme.parse("w3a16"), torch.float32)
    assert torch.equal(whole.codes[:, 128:], tail.codes)


@pytest.mark.parametrize("text", [*SCHEMES, *MINIMA])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_reported_error_is_the_error(text: str, clip: str) -> None:
    scheme, w = Scheme.parse(text), torch.randn(8, 64)
    found = round_to_nearest(w, scheme, torch.float32, clip)
    back = dequantize(found.codes, found.scale, found.zero, scheme)
    assert found.squared_error == pytest.approx(float((back - w).square().sum()), rel=1e-4)
    assert found.squared_norm == pytest.approx(float(w.square().sum()), rel=1e-5)


@pytest.mark.parametrize("text", [*SCHEMES, *MINIMA])
def test_error_is_at_most_half_a_step_unclipped(text: str) -> None:
    scheme, w = Scheme.parse(text), torch.randn(16, 128)
    found = round_to_nearest(w, scheme, torch.float32)
    back = dequantize(found.codes, found.scale, found.zero, scheme)
    step = found.scale.repeat_interleave(scheme.group or 128, -1)
    assert bool(((back - w).abs() <= 0.5 * step * (1 + 1e-4) + 1e-6).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(-8, 8), st.sampled_from([*SCHEMES, *MINIMA]))
def test_scaling_by_a_power_of_two_scales_the_result(power: int, text: str) -> None:
    scheme, w = Scheme.parse(text), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    a, b = round_to_nearest(w, scheme, torch.float32), round_to_nearest(w * 2.0**power, scheme, torch.float32)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale * 2.0**power, b.scale)


@pytest.mark.parametrize("text", [*SCHEMES, *MINIMA])
def test_mse_clip_never_loses_per_group(text: str) -> None:
    scheme, w = Scheme.parse(text), torch.randn(32, 64).pow(3)
    plain, clipped = (round_to_nearest(w, scheme, torch.float32, clip) for clip in ("none", "mse"))
    errors = [
        (dequantize(f.codes, f.scale, f.zero, scheme) - w).square().reshape(32, -1, scheme.group or 64).sum(-1)
        for f in (plain, clipped)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    if scheme.bits <= 3 and scheme.symmetric:
        assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize(
    ("text", "decibel"), [("w4a16g128-asym", 19.94), ("w3a16g128-asym", 13.33), ("w2a16g128-asym", 5.97), ("w2a16g64-asym", 6.81)]
)
def test_signal_to_noise_on_gaussian_weights(text: str, decibel: float) -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(w, Scheme.parse(text), torch.float32)
    assert 10 * math.log10(found.squared_norm / found.squared_error) == pytest.approx(decibel, abs=0.1)


def test_extreme_magnitudes_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        info = torch.finfo(dtype)
        w = torch.tensor([[info.max, -info.max, 0, 1] * 8, [info.tiny, -info.tiny, 0, 0] * 8]).to(dtype)
        for text in ("w4a16", "w2a16-asym", "w4a16-min"):
            found = round_to_nearest(w, Scheme.parse(text), dtype)
            assert bool(found.scale.isfinite().all())
            assert bool((found.scale > 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_a_least_zero_point_is_kept_and_costs_only_the_groups_that_need_it(bits: int, clip: str) -> None:
    scheme = Scheme.parse(f"w{bits}a16g32-asym")
    w = torch.randn(64, 128)
    w[:8] = w[:8].abs()
    free, bound = (round_to_nearest(w, scheme, torch.float32, clip, least) for least in (0, 1))
    assert free.zero is not None
    assert bound.zero is not None
    assert int(free.zero[:8].min()) == 0
    assert int(bound.zero.min()) >= 1
    if clip == "none":
        same = free.zero >= 1
        assert torch.equal(free.scale[same], bound.scale[same])
        assert torch.equal(free.zero[same], bound.zero[same])
        # The largest weight of a group that starts at zero is still reached.
        value = dequantize(bound.codes, bound.scale, bound.zero, scheme)
        assert torch.allclose(value[:8].unflatten(1, (4, 32)).amax(-1), w[:8].unflatten(1, (4, 32)).amax(-1), rtol=1e-5)
