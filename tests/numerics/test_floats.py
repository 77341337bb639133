"""Small floats and code books against oracles that go through all values, and against torch's own casts."""

from __future__ import annotations

import math

import pytest
import torch

from compress.numerics.floats import NF4, decode, encode, normal_map, top
from compress.spec.scheme import Scheme

TEXTS = ["nf4g64", "nf3g64", "nf2g64", "iq4_nl", "fp4g32", "e3m0g32", "fp8", "fp8-e5m2"]
SIGNED = [text for text in TEXTS if not text.startswith(("nf", "iq"))]


def values(scheme: Scheme) -> torch.Tensor:
    return decode(torch.arange(scheme.levels, dtype=torch.int32).to(torch.uint8), scheme)


def oracle(x: float, scheme: Scheme) -> float:
    """The nearest finite value; of two, the one with the even code."""
    table = [(v, code) for code, v in enumerate(values(scheme).tolist()) if math.isfinite(v)]
    least = min(abs(v - x) for v, _ in table)
    near = [(v, code) for v, code in table if abs(v - x) == least]
    return min(near, key=lambda pair: (pair[1] % 2, pair[1]))[0]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_value_is_found(text: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(text)
    table = values(scheme)
    table = table[table.isfinite()].sort().values
    # In nf there are ties in real numbers alone, and in iq4 the lower one is taken.
    ties = (table[1:] + table[:-1]) / 2 if scheme.grid not in ("nf", "iq4") else table
    spread = torch.randn(200, generator=torch.Generator().manual_seed(0)) * top(scheme) / 3
    x = torch.cat([table, ties, spread, torch.tensor([1e6, -1e6])]).to(dtype)
    found = decode(encode(x, scheme), scheme)
    assert found.tolist() == [oracle(v, scheme) for v in x.tolist()]


@pytest.mark.parametrize("text", TEXTS)
def test_codes_and_values_are_one_to_one(text: str) -> None:
    scheme = Scheme.parse(text)
    codes = torch.arange(scheme.levels, dtype=torch.int32).to(torch.uint8)
    finite = decode(codes, scheme).isfinite()
    assert torch.equal(encode(decode(codes, scheme), scheme)[finite], codes[finite])
    assert int(finite.sum()) == {"e4m3": 254, "e5m2": 248}.get(scheme.grid, scheme.levels)


@pytest.mark.parametrize("text", SIGNED)
def test_rounding_is_odd_and_keeps_the_sign_of_zero(text: str) -> None:
    scheme = Scheme.parse(text)
    x = torch.cat([torch.randn(500, generator=torch.Generator().manual_seed(1)) * top(scheme), torch.tensor([0.0, 1e-9])])
    a, b = (decode(encode(v, scheme), scheme) for v in (x, -x))
    assert torch.equal(a, -b)
    assert torch.equal(a.signbit(), ~b.signbit())


def test_ties_and_saturation_of_e2m1() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 1e9, float("inf")])
    scheme = Scheme.parse("mxfp4")
    assert decode(encode(x, scheme), scheme).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 6]
    assert encode(torch.tensor([0.5, -0.5, -0.0]), scheme).tolist() == [1, 9, 8]


@pytest.mark.parametrize(
    ("text", "dtype", "largest"), [("fp8", torch.float8_e4m3fn, 448), ("fp8-e5m2", torch.float8_e5m2, 57344)]
)
def test_fp8_is_the_cast_within_range_and_saturates_beyond(text: str, dtype: torch.dtype, largest: float) -> None:
    scheme = Scheme.parse(text)
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 10000)
    assert torch.equal(encode(x, scheme), x.to(dtype).view(torch.uint8))
    beyond = decode(encode(torch.tensor([1e30, -1e30, float("inf")]), scheme), scheme)
    assert beyond.tolist() == [largest, -largest, largest]
    assert bool(decode(encode(torch.tensor([float("nan")]), scheme), scheme).isnan())


def test_nf_grids_are_those_of_qlora_and_loftq() -> None:
    assert normal_map(2) == pytest.approx((-1, 0, 0.3379, 1), abs=1e-4)
    assert normal_map(3) == pytest.approx((-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1), abs=1e-4)
    assert normal_map(4) is NF4
    for bits in (2, 3, 4):
        table = normal_map(bits)
        assert len(table) == 1 << bits
        assert {-1.0, 0.0, 1.0} <= set(table)


def test_four_bits_shifted_are_eight_bits() -> None:
    """The windows in which FP4 becomes FP8 without losing a bit."""
    for text, low, high in (("fp4g32", -8, 6), ("e3m0g32", -7, 4)):
        table = values(Scheme.parse(text))
        for k in range(-20, 20):
            shifted = table * 2.0**k
            exact = torch.equal(shifted.clamp(-448, 448).to(torch.float8_e4m3fn).float(), shifted)
            assert exact == (low <= k <= high), (text, k)
