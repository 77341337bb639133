"""CUDA graphs and torch.compile: captured once, right for other activations."""

from __future__ import annotations

import pytest
import torch

from compress.errors import Refusal
from compress.kernels.native.modules import PackedWeight
from gpu.cases import DEVICE, DTYPES, KERNELS, check, inputs, made, weight_of

STATES = ("w4a16g128", "w3a16g64-asym", "nf4g64", "fp8", "codes(w4a16g128)+outliers(0.005)+lowrank(r16)", "fp8-afp8")


class Net(torch.nn.Module):
    """A product between others."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.linear(x * 1.0)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs are of GPUs")
@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_captured_product_is_replayed(state: str, tokens: int, backend: str) -> None:
    packed, dense = made(state, 272, 512, torch.bfloat16)
    try:
        weight = weight_of(packed, torch.bfloat16, backend)
    except Refusal as refusal:
        pytest.skip(f"{backend}: {refusal.reason}")
    x = inputs(packed, tokens, torch.bfloat16)
    weight.linear(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight.linear(x)
    for _ in range(3):
        x.copy_(inputs(packed, tokens, torch.bfloat16))
        graph.replay()
        check(out, x, dense)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs are of GPUs")
@pytest.mark.parametrize("backend", KERNELS)
def test_captured_experts_follow_offsets_that_change(backend: str) -> None:
    packed, dense = made("w4a16g64", 272, 512, torch.bfloat16, experts=4)
    try:
        weight = weight_of(packed, torch.bfloat16, backend)
    except Refusal as refusal:
        pytest.skip(f"{backend}: {refusal.reason}")
    x = inputs(packed, 40, torch.bfloat16)
    offsets = torch.tensor([0, 10, 20, 30, 40], dtype=torch.int32, device=DEVICE)
    weight.grouped(x, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight.grouped(x, offsets)
    for ends in ([0, 0, 40, 40, 40], [0, 7, 7, 39, 40], [0, 40, 40, 40, 40]):
        offsets.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        for expert in range(4):
            rows = slice(ends[expert], ends[expert + 1])
            if ends[expert] < ends[expert + 1]:
                check(out[rows], x[rows], dense[expert])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", ["w4a16g128", "fp8"])
def test_it_compiles_whole(state: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    packed, dense = made(state, 272, 512, kind)
    net = Net(PackedWeight(packed, kind))
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for tokens in (1, 16, 130):
        x = inputs(packed, tokens, kind)
        check(compiled(x), x, dense)
