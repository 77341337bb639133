"""Every format by every backend that takes it, in every regime, against fp32: through the operator, and twice."""

from __future__ import annotations

import pytest
import torch

from compress.errors import Refusal
from gpu.cases import DEVICE, DTYPES, RUNNING, SCHEMES, TOKENS, check, inputs, made, twice, weight_of

SHAPES = [(272, 512), (1000, 1160)]
"""Whole tiles, chunks and groups; and none of them."""
BESIDE = [
    "codes(w4a16g128)+outliers(0.005)", "codes(w4a16g128)+lowrank(r16)", "codes(w3a16g64)+outliers(0.01)+lowrank(r8-int8)",
    "codes(nf4g64)+outliers(0.005)", "codes(fp8)+lowrank(r16)", "masked(2:4)", "codes(w4a16g64)+masked(2:4)",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [*SCHEMES[:10], *BESIDE, *SCHEMES[10:]])
@pytest.mark.parametrize("backend", RUNNING)
def test_products_are_those_of_what_codes_mean(state: str, dtype: str, backend: str) -> None:
    kind, refused = getattr(torch, dtype), []
    for rows, columns in SHAPES:
        packed, dense = made(state, rows, columns, kind)
        try:
            weight = weight_of(packed, kind, backend)
        except Refusal as refusal:
            refused.append(refusal.reason)
            continue
        bias = torch.randn(rows, dtype=kind, device=DEVICE)
        for tokens in TOKENS:
            x = inputs(packed, tokens, kind)
            check(twice(weight.linear, x), x, dense)
            check(twice(weight.linear, x, bias), x, dense, bias)
        # Rows of a matrix that is wider, as a slice of activations is.
        wide = inputs(packed, 16, kind).repeat(1, 2)[:, :columns]
        check(weight.linear(wide), wide, dense)
        if packed.state.lowrank is None:
            assert torch.equal(weight.dense(), dense.to(kind))
        else:
            # Factors are multiplied some rows at a time.
            torch.testing.assert_close(weight.dense(), dense.to(kind), rtol=1e-2, atol=1e-2)
    if len(refused) == len(SHAPES):
        pytest.skip(f"{backend}: {refused[0]}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", RUNNING)
def test_gradients_of_inputs(dtype: str, backend: str) -> None:
    kind = getattr(torch, dtype)
    packed, dense = made("w4a16g128", 272, 512, kind)
    try:
        weight = weight_of(packed, kind, backend)
    except Refusal as refusal:
        pytest.skip(f"{backend}: {refusal.reason}")
    x = inputs(packed, 5, kind).requires_grad_()
    gradient = torch.randn(5, 272, dtype=kind, device=DEVICE)
    weight.linear(x).backward(gradient)
    assert x.grad is not None
    check(x.grad, gradient, dense.T)
