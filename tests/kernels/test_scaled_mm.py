"""scaled_mm: FP8 by FP8 as torch multiplies it, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from compress.errors import Refusal
from compress.kernels.cuda import device
from compress.kernels.cuda.cubins import Capability
from compress.kernels.dispatch import Work, load_backend
from compress.kernels.native import scaled_mm
from compress.kernels.native.modules import PackedWeight
from compress.numerics.inputs import in_fp8, rounded_inputs
from compress.spec.corrections import Lowrank
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from support import packed_weight, prepared


@pytest.mark.parametrize("text", ["fp8-afp8", "fp8-tensor-afp8"])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(48, 64, 16), (33, 70, 5), (16, 16, 1)])
def test_scaled_mm_is_what_rounded_activations_mean(text: str, rows: int, columns: int, tokens: int) -> None:
    packed, x = packed_weight(text, rows, columns), 3 * torch.randn(tokens, columns).bfloat16()
    x[0, ::3] = 0
    held, bias = prepared("scaled_mm", packed), torch.randn(rows).bfloat16()
    rounded, dense = rounded_inputs(x, packed.scheme), packed.unpack().dequantize()
    exact = linear(rounded.double(), dense.double(), bias.double())
    backend = load_backend("scaled_mm")
    found = backend.linear(rounded, held, bias, False)
    assert torch.equal(backend.linear(rounded.T.contiguous().T, held, bias, False), found)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    # Two roundings to 8 bits: of activations, which are multiplied as they were before, and of outputs.
    assert (found - exact).abs().max() <= 2**-8 * (linear(rounded.abs().double(), dense.abs().double()).max() + exact.abs().max())
    assert torch.equal(torch.cat([backend.rows(held, part, torch.float32) for part in backend.chunks(held, 1 << 10)]), dense)


def test_the_rounding_of_activations_is_found_again() -> None:
    """For every number in bf16 that may be the largest of a token, but the tiniest, whose scales have fewer bits, and the last."""
    largest = torch.arange(0x0600, 0x7F7F, dtype=torch.int16).view(torch.bfloat16)[:, None]
    x = torch.cat([largest, largest * (2 * torch.rand(len(largest), 30) - 1).bfloat16(), largest * 0], 1)
    q, s = in_fp8(x)
    rounded = rounded_inputs(x, Scheme.parse("fp8-afp8"))
    again, scale = in_fp8(rounded)
    assert torch.equal(scale, s)
    assert torch.equal(again.float(), q.float())
    assert torch.equal(again.bfloat16() * scale, rounded)


def test_scaled_mm_adds_low_rank_factors() -> None:
    packed = packed_weight("fp8-afp8", 48, 64)
    left, right = torch.randn(48, 3).bfloat16(), torch.randn(3, 64).bfloat16()
    state = replace(packed.state, lowrank=Lowrank(3))
    packed = replace(packed, state=state, parts={**packed.parts, "left": left, "right": right})
    held, x = prepared("scaled_mm", packed), rounded_inputs(torch.randn(4, 64).bfloat16(), packed.scheme)
    backend, dense = load_backend("scaled_mm"), packed.unpack().dequantize()
    exact = linear(x.double(), dense.double())
    assert (backend.linear(x, held, None, False) - exact).abs().max() <= 2e-2 * exact.abs().max()
    assert torch.equal(torch.cat([backend.rows(held, part, torch.float32) for part in backend.chunks(held, 1 << 10)]), dense)


def test_scaled_mm_runs_a_stack_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable", lambda kind: Capability(9, 0))
    monkeypatch.setattr(scaled_mm, "_fails", lambda: "")
    packed = packed_weight("fp8-afp8", 20, 40, experts=3)
    weight, dense = PackedWeight(packed, torch.bfloat16), packed.unpack().dequantize()
    assert weight.backend == "scaled_mm"
    x = rounded_inputs(torch.randn(6, 40).bfloat16(), packed.scheme)
    for expert in range(3):
        exact = linear(x.double(), dense[expert].double())
        assert (weight.linear(x, None, expert) - exact).abs().max() <= 2e-2 * exact.abs().max()
        assert torch.equal(weight.dense(expert), dense[expert].bfloat16())
    weight.to(torch.float16)
    assert weight.fp8.dtype == torch.float8_e4m3fn


def test_torchs_own_words_where_it_does_not_multiply_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable", lambda kind: Capability(12, 0))
    monkeypatch.setattr(scaled_mm, "_fails", lambda: "CUBLAS_STATUS_NOT_SUPPORTED")
    work = Work(State(Scheme.parse("fp8-afp8")), 256, 512, torch.bfloat16, torch.float32, "cuda")
    with pytest.raises(Refusal, match=r"does not multiply FP8 with scales of rows here: CUBLAS_STATUS_NOT_SUPPORTED"):
        load_backend("scaled_mm").refuse(work)
    monkeypatch.setattr(scaled_mm, "_fails", lambda: "")
    load_backend("scaled_mm").refuse(work)
