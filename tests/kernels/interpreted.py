"""Triton's kernels under its interpreter: numbers against fp64, and the road from the operator down.

Run by test_triton.py in a process of its own, since TRITON_INTERPRET=1 must be there before triton is. The interpreter cuts
fp32 off to bf16 instead of rounding, which the bounds allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import linear

from compress.errors import Refusal
from compress.kernels.dispatch import Work, load_backend
from compress.kernels.native import triton
from compress.kernels.native.kind import Kind
from compress.kernels.native.modules import PackedWeight
from compress.kernels.native.packed import Packed, pack
from compress.numerics import lowrank, outliers
from compress.numerics.rounding import nearest
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from support import few, shared

SCHEMES = [
    "w4a16", "w4a16g128", "w4a16g64-asym", "w4a16g32-asym", "w4a16g256", "w4a16g16", "w3a16", "w3a16g64-asym", "w3a16g16-asym", "w2a16g256",
    "w2a16g32-asym", "w2a16g16", "w8a16", "w8a16-asym", "w8a16g32-asym", "nf4g64", "nf4", "e3m0g32", "fp4g128-m2", "fp4", "mxfp4", "nvfp4",
    "fp8", "fp8-e5m2", "fp8-tensor", "fp8-block",
]  # fmt: skip
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def packed_of(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Packed, torch.Tensor]:
    """A prepared matrix, and what it means in fp64."""
    scheme = Scheme.parse(text)
    q = nearest(torch.randn(shape).to(dtype), scheme, dtype).q
    packed = Packed(State(scheme), *shape[-2:], pack(q))
    return replace(packed, parts=triton.Triton().prepare(packed)), q.dequantize().double()


def close(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """One rounding of sums in fp32."""
    exact = linear(x.double(), dense, None if bias is None else bias.double())
    terms = linear(x.double().abs(), dense.abs())
    eps = EPS[x.dtype]
    assert ((found.double() - exact).abs() <= eps * exact.abs() + 1e-6 * terms + 1e-6).all()


@pytest.mark.parametrize(("text", "dtype"), shared(SCHEMES, [torch.float16, torch.bfloat16], one_in=4))
def test_every_kind_where_nothing_is_even(text: str, dtype: torch.dtype) -> None:
    packed, dense = packed_of(text, (37, 200), dtype)
    # What lies beside x is no zero: columns beyond the last are not read.
    x = torch.full((5, 208), torch.nan, dtype=dtype)[:, :200]
    x.copy_(torch.randn(5, 200))
    bias = torch.randn(37).to(dtype)
    close(load_backend("triton").linear(x, packed, bias, False), x, dense, bias)


@pytest.mark.parametrize(
    ("text", "tokens"),
    shared(
        ["w4a16g128", "w3a16g64-asym", "w2a16g32", "w8a16", "nf4g64", "mxfp4", "nvfp4", "fp8-block"],
        [0, 1, 17, 33, 65, 130],
        one_in=4,
    ),
)
def test_every_tile(text: str, tokens: int) -> None:
    packed, dense = packed_of(text, (130, 256), torch.float16)
    x = torch.randn(256, tokens).half().T
    found = load_backend("triton").linear(x, packed, None, False)
    assert found.shape == (tokens, 130)
    close(found, x, dense)


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (129, 257)])
@pytest.mark.parametrize("text", ["w8a16", "w2a16"])
def test_the_smallest_and_the_odd(shape: tuple[int, int], text: str) -> None:
    packed, dense = packed_of(text, shape, torch.float16)
    x = torch.randn(2, shape[1]).half()
    close(load_backend("triton").linear(x, packed, None, False), x, dense)


@pytest.mark.parametrize("text", few(["w8a16g64", "fp8", "nvfp4"], "fp8"))
def test_splits_of_columns_are_added_in_order(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = packed_of(text, (40, 1300), torch.float16)
    x, bias, backend = torch.randn(3, 1300).half(), torch.randn(40).half(), load_backend("triton")
    found = {}
    for parts in (1, 2, 3, 100):
        monkeypatch.setattr(triton, "splits", lambda *_, parts=parts: parts)
        found[parts] = backend.linear(x, packed, bias, False)
        close(found[parts], x, dense, bias)
    assert torch.equal(backend.linear(x, packed, bias, False), found[100])


def test_splits_leave_enough_to_each_program() -> None:
    kind = Kind.of(Work(State(Scheme.parse("w4a16g128")), 4096, 4096, torch.float16, torch.float16, "cuda"))
    few, many = (triton.tile(kind, False, tokens, (9, 0)) for tokens in (1, 2000))
    assert triton.splits(kind, few, 32, 32, 132) == 8
    assert triton.splits(kind, few, 32, 4, 132) == 1
    assert triton.splits(kind, few, 1000, 32, 132) == 1
    assert triton.splits(kind, many, 32, 32, 132) == 1


@pytest.mark.parametrize(
    ("text", "counts"),
    shared(
        ["w4a16g32-asym", "w3a16g64", "nvfp4", "fp8-tensor", "fp8-block"],
        [(0, 3, 0, 1, 0), (40, 0, 0, 2, 5), (0, 0, 0, 0, 0), (17, 16, 1, 33, 64)],
        one_in=4,
    ),
)
def test_experts_in_one_launch(text: str, counts: tuple[int, ...]) -> None:
    scheme = Scheme.parse(text)
    q = nearest(torch.randn(5, 37, 130).half(), scheme, torch.float16).q
    weight = PackedWeight(Packed(State(scheme), 37, 130, pack(q)), torch.float16, backend="triton")
    x, dense = torch.randn(sum(counts), 130).half(), q.dequantize().double()
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    found = load_backend("triton").grouped(x, weight.packed(), offsets)
    assert found.shape == (sum(counts), 37)
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        close(found[start:end], x[start:end], dense[expert])


@pytest.mark.parametrize("experts", [False, True])
def test_corrections_are_added(experts: bool) -> None:
    scheme, w = Scheme.parse("w4a16g32"), torch.randn(40, 160).half()
    split = outliers.split(w, Outliers(0.02))
    q = nearest(split.rest, scheme, w.dtype).q
    factors = lowrank.stored(*lowrank.best(w.float() - q.dequantize(), 3), Lowrank(3, int8=True))
    q = replace(q, outliers=split.sparse, lowrank=factors)
    packed = Packed(State(scheme, None, Outliers(0.02), Lowrank(3, int8=True)), 40, 160, pack(q))
    backend, x, dense = load_backend("triton"), torch.randn(6, 160).half(), q.dequantize().double()
    held = replace(packed, parts=backend.prepare(packed))
    if experts:
        stack = replace(held, parts={name: torch.stack([part, part]) for name, part in held.parts.items()})
        found = backend.grouped(x, stack, torch.tensor([0, 2, 6], dtype=torch.int32))
    else:
        found = backend.linear(x, held, None, False)
    exact = linear(x.double(), dense)
    assert (found - exact).abs().max() <= 4e-3 * exact.abs().max()


@pytest.mark.parametrize("text", ["w4a16g32", "nvfp4"])
def test_the_operator_eager_and_compiled(text: str) -> None:
    scheme = Scheme.parse(text)
    q = nearest(torch.randn(48, 192).half(), scheme, torch.float16).q
    weight = PackedWeight(Packed(State(scheme), 48, 192, pack(q)), torch.float16, backend="triton")
    dense = q.dequantize().double()
    x = torch.randn(2, 3, 192).half()
    close(weight.linear(x).flatten(0, 1), x.flatten(0, 1), dense)
    compiled = torch.compile(lambda x: torch.relu(weight.linear(x)), fullgraph=True, dynamic=True)
    for tokens in (4, 9):
        x = torch.randn(tokens, 192).half()
        assert torch.equal(compiled(x), torch.relu(weight.linear(x)))


def test_refusals() -> None:
    work = Work(State(Scheme.parse("w4a16g32")), 48, 192, torch.float16, torch.float16, "cpu")
    backend = load_backend("triton")
    backend.refuse(work)
    with pytest.raises(Refusal, match="not half precision"):
        backend.refuse(replace(work, dtype=torch.float32))
