"""Rounded activations: each kind against a slow loop over tokens, and against the code of the library that reads them."""

from __future__ import annotations

import math

import pytest
import torch

from compress.kernels.compressed_tensors.parts import group_of
from compress.numerics.floats import E2M1
from compress.numerics.inputs import input_divisor, rounded_inputs
from compress.spec.scheme import Scheme

SCHEMES = [
    "w8a8", "w4a8g32", "w4a4", "w3a4g32", "w4a4-aasym", "w8a8-aasym", "fp8-afp8", "fp8-block-afp8", "mxfp4-amxfp4",
    "nvfp4-anvfp4",
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(dtype: torch.dtype, width: int = 128) -> torch.Tensor:
    """Tokens [3, 4, width] of very different sizes, one of them zero, one of only positive numbers, with a few outliers."""
    x = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 4)[:, None]
    x[0, 1] = 0
    x[1, 1] = x[1, 1].abs() + 0.01
    x[:, 3, ::40] *= 30
    return x.to(dtype)


def even(x: float) -> float:
    """The whole number nearest to x; at a tie the even one."""
    return float(round(x))


def slow(token: list[float], scheme: Scheme, d: float) -> list[float]:
    """One token in double precision, number by number."""
    bits, kind = scheme.input_bits, scheme.inputs
    if kind.startswith("int"):
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        low, high = min(0.0, *token), max(0.0, *token)
        if kind.endswith("asym"):
            s = (high - low) / (most - least)
            z = even(max(least, min(most, least - low / s))) if s else 0.0
        else:
            s, z = 2 * max(-low, high) / (most - least), 0.0
        return [(even(max(least, min(most, x / s + z))) - z) * s if s else 0.0 for x in token]
    found: list[float] = []
    size = 32 if kind == "mxfp4" else 16
    grid = sorted({sign * value for sign in (1, -1) for value in E2M1})
    for start in range(0, len(token), size):
        block = token[start : start + size]
        p = max(map(abs, block))
        if kind == "mxfp4":
            fraction, exponent = math.frexp(p)  # 0.5 <= fraction < 1; 1.75 of a power goes up to the next one
            s = 2.0 ** (exponent - 1 - 2 + (fraction >= 0.875)) if p else 1.0
        else:
            s = float(torch.tensor(min(448.0, p / 6 * d)).to(torch.float8_e4m3fn)) / d or 0.125 / d
        found += [s * min(grid, key=lambda v: (abs(v - x / s), abs(v) in (0.5, 1.5, 3.0, 6.0))) for x in block]
    return found


@pytest.mark.parametrize("text", [text for text in SCHEMES if "fp8" not in text])
def test_each_kind_against_a_slow_loop(text: str) -> None:
    scheme, x = Scheme.parse(text), tokens(torch.float32)
    d = input_divisor(float(x.abs().max())) if scheme.input_divisor else None
    found = rounded_inputs(x, scheme, d)
    theirs = torch.tensor([slow(t.tolist(), scheme, 1.0 if d is None else float(d)) for t in x.flatten(0, 1)]).view_as(x)
    # In fp32 a quotient may fall on the other side of a tie; it hardly ever does.
    off = (found - theirs).abs() > 1e-5 * theirs.abs() + 1e-7
    assert float(off.float().mean()) < 2e-3
    assert not bool(found[0, 1].any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SCHEMES)
def test_bit_for_bit_what_compressed_tensors_computes(text: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scheme, x = Scheme.parse(text), tokens(dtype)
    args = QuantizationScheme(targets=["Linear"], **group_of(scheme)).input_activations
    d = input_divisor(float(x.abs().max())) if scheme.input_divisor else None
    whole = None if d is None else d.view(1)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1), global_scale=whole)
    theirs = fake_quantize(x, scale, zero, args, global_scale=whole)
    found = rounded_inputs(x, scheme, d)
    assert (found.dtype, found.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(found, theirs)


def test_zero_points_use_all_codes_of_tokens_of_one_sign() -> None:
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) + 0.1
    plain, shifted = (rounded_inputs(x, Scheme.parse(text)) for text in ("w4a4", "w4a4-aasym"))
    assert len(plain[0].unique()) <= 8 < len(shifted[0].unique()) <= 16
    assert float((shifted - x).norm()) < 0.6 * float((plain - x).norm())


def test_the_number_for_all_inputs_reaches_scales_that_would_be_zero() -> None:
    x, scheme = 1e-4 * torch.randn(2, 64, generator=torch.Generator().manual_seed(2)), Scheme.parse("nvfp4-anvfp4")
    measured = rounded_inputs(x, scheme, input_divisor(float(x.abs().max())))
    assert float((measured - x).norm() / x.norm()) < 0.12
    assert not bool(rounded_inputs(x, scheme).any())


@pytest.mark.parametrize("text", SCHEMES)
def test_no_token_depends_on_another(text: str) -> None:
    scheme, x = Scheme.parse(text), tokens(torch.float32)
    d = torch.tensor(3.0) if scheme.input_divisor else None
    whole = rounded_inputs(x, scheme, d)
    assert torch.equal(whole[1, 2], rounded_inputs(x[1, 2][None], scheme, d)[0])
    assert rounded_inputs(x[:0], scheme, d).shape == (0, 4, 128)
