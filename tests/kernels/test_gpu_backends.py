"""Backends that run on GPUs, as far as a CPU shows it: what they refuse, choose, launch and, emulated, compute."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import linear

from compress.errors import MachineError, Refusal
from compress.kernels import dispatch
from compress.kernels.cuda import build, cubins, device
from compress.kernels.cuda.cubins import Capability
from compress.kernels.cuda.nvrtc import nvrtc
from compress.kernels.cuda.variant import Variant, headers
from compress.kernels.dispatch import Work, choose, load_backend
from compress.kernels.native import gpu, table
from compress.kernels.native.cuda import skinny
from compress.kernels.native.kind import Kind
from compress.kernels.native.modules import PackedWeight
from compress.kernels.native.packed import Packed, pack
from compress.numerics import lowrank, outliers
from compress.numerics.rounding import nearest
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from emulated import Emulator
from support import packed_weight, prepared, shared

if TYPE_CHECKING:
    from conftest import Libcuda

W4 = Work(State(Scheme.parse("w4a16g128")), 256, 512, torch.bfloat16, torch.bfloat16, "cuda")
H100 = Capability(9, 0)
FP8 = Work(State(Scheme.parse("fp8-afp8")), 256, 512, torch.bfloat16, torch.float32, "cuda")
POINTERS = {"skinny": (9, 8), "finish": (5, 4), "expand": (6, 5), "outliers": (5, 3)}
"""How many pointers and integers the kernels take."""


@pytest.mark.parametrize(("name", "work", "capability", "said"), [
    ("cuda", W4, (7, 0), "has compute capability 7.0, and kernels need 7.5"),
    ("cuda", W4, (7, 5), "7.5 does not multiply in bfloat16"),
    ("cublas", W4, (7, 5), "7.5 does not multiply in bfloat16"),
    ("cuda", replace(W4, dtype=torch.float32), (9, 0), "activations are float32"),
    ("cuda", replace(W4, turned=True), (9, 0), "Conv1D"),
    ("cuda", replace(W4, state=State(Scheme.parse("nf3g32"))), (9, 0), "table of 8 values"),
    ("gpu", replace(W4, dtype=torch.float32), (9, 0), "activations are float32"),
    ("scaled_mm", W4, (9, 0), "codes.w4a16g128. is not FP8 E4M3 by rows with activations in FP8"),
    ("scaled_mm", replace(FP8, state=State(Scheme.parse("fp8"))), (9, 0), "is not FP8 E4M3 by rows"),
    ("scaled_mm", replace(FP8, state=State(Scheme.parse("fp8-block-afp8"))), (9, 0), "is not FP8 E4M3 by rows"),
    ("scaled_mm", FP8, (8, 6), "8.6 does not multiply FP8"),
    ("scaled_mm", replace(FP8, dtype=torch.float16), (9, 0), "comes out in bfloat16"),
    ("scaled_mm", replace(FP8, turned=True), (9, 0), "Conv1D"),
    ("scaled_mm", replace(FP8, looked_up=True), (9, 0), "looked up"),
    ("scaled_mm", replace(FP8, state=replace(FP8.state, outliers=Outliers(0.1))), (9, 0), "it has outliers"),
])  # fmt: skip
def test_refusals(name: str, work: Work, capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable", lambda kind: Capability(*capability))
    with pytest.raises(Refusal, match=said) as refusal:
        load_backend(name).refuse(work)
    assert refusal.value.do


@pytest.mark.parametrize("name", ["cuda", "cublas", "gpu", "scaled_mm"])
def test_this_machine_says_why_it_has_no_gpu(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("it has one")
    work = FP8 if name == "scaled_mm" else W4
    with pytest.raises(Refusal, match=r"^(this torch is built without CUDA|torch finds no CUDA driver, or no GPU)$"):
        load_backend(name).refuse(work)
    with pytest.raises(Refusal, match=r"^the weight lies on cpu$"):
        load_backend(name).refuse(replace(work, device="cpu"))


def test_code_that_is_nowhere_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(variant: object, capability: object) -> str:
        raise Refusal(f"there is no {variant}", "install NVRTC")

    monkeypatch.setattr(device, "usable", lambda kind: H100)
    monkeypatch.setattr(cubins, "origin", none)
    with pytest.raises(Refusal, match=r"there is no skinny-int4-p4-bf16-bf16-n1"):
        load_backend("cuda").refuse(W4)
    with pytest.raises(Refusal, match=r"^there is no expand-int4-p4-bf16-bf16$"):
        load_backend("cublas").refuse(W4)


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of `gpu`, that they are asked anew."""
    caches = (gpu._able, gpu._by_speed, dispatch.tell_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("members")
def test_gpu_is_the_default_of_gpus_and_tells_of_its_members(
    libcuda: Libcuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(work: Work) -> None:
        raise Refusal("cublas is not to be had", "do without")

    monkeypatch.setattr(load_backend("cublas"), "refuse", refuse)
    with caplog.at_level(logging.INFO, "compress"):
        assert choose(W4).name == choose(W4).name == "gpu"
    told = [record.message for record in caplog.records]
    assert told.count("backend cublas is passed over: cublas is not to be had") == 1
    assert sum("backend scaled_mm is passed over" in line for line in told) == 1


def test_the_table_goes_from_few_tokens_to_many() -> None:
    for capability in map(Capability, (7, 8, 8, 8, 9, 10, 12), (5, 0, 6, 9, 0, 0, 0)):
        for text in ("w4a16g128", "w3a16g64-asym", "nf4g64", "fp8", "nvfp4"):
            kind = Kind.of(replace(W4, state=State(Scheme.parse(text))))
            orders = [table.order(capability, kind, tokens) for tokens in (1, 8, 16, 64, 256, 4096)]
            assert all(sorted(order) == ["cublas", "cuda", "triton"] for order in orders)
            assert orders[0][0] == orders[1][0] == "cuda"
            assert orders[-1][0] == "cublas"
            first = [("cuda", "triton", "cublas").index(order[0]) for order in orders]
            assert first == sorted(first)
    kind = Kind.of(W4)
    assert [table.order(H100, kind, tokens)[0] for tokens in (8, 9, 1700, 1701)] == ["cuda", "triton", "triton", "cublas"]
    assert [table.order(Capability(7, 5), kind, tokens)[0] for tokens in (31, 32)] == ["cuda", "cublas"]
    assert table.row(Capability(8, 7)) is table.row(Capability(8, 6))
    assert table.row(Capability(12, 0)) is table.row(H100)


def test_tiles_and_splits() -> None:
    kind = Kind.of(W4)
    assert [table.tiles(kind, tokens) for tokens in (1, 8, 9, 16, 17, 32, 33, 999)] == [1, 1, 2, 2, 4, 4, 4, 4]
    assert table.tiles(replace(kind, bits=3), 999) == 2
    # A warp keeps two chunks; where there are rows enough, columns stay whole.
    assert table.splits(H100, 132, 4096 // 16, 8, 32) == 2
    assert table.splits(H100, 132, 57344 // 16, 8, 64) == 1
    assert table.splits(H100, 132, 1, 8, 1) == 1
    assert table.splits(H100, 132, 1, 8, 10_000) == 8


@pytest.mark.parametrize(
    ("rows", "columns", "text"),
    [(256, 512, "w4a16g128"), (40, 130, "nf4g64"), (40, 2048, "w3a16g128-asym"), (16, 4096, "fp8-tensor"), (33, 64, "nvfp4")],
)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_what_is_launched_is_what_kernels_are_said_to_take(
    libcuda: Libcuda, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, text: str, tokens: int
) -> None:
    """Every argument, in order, as the sources name them."""
    monkeypatch.setattr(cubins, "find", lambda v, c: cubins.Code("a test", "{} {}".format(*POINTERS[v.source]).encode()))
    packed, x, bias = (
        prepared("cuda", packed_weight(text, rows, columns)),
        torch.randn(tokens, columns).bfloat16(),
        torch.randn(rows).bfloat16(),
    )
    load_backend("cuda").product(x, packed, bias)
    parts, kind = (
        packed.parts,
        Kind.of(replace(W4, state=packed.state, scales=packed.parts.get("grid", packed.parts["scale"]).dtype)),
    )
    (held, chunks), groups = parts["tiles"].shape[:2], parts.get("grid", parts["scale"]).shape[1]
    count = table.tiles(kind, tokens)
    high = -(-tokens // (8 * count))
    splits = table.splits(H100, 132, held * high, table.warps(count), chunks)
    lines = [line.split() for line in libcuda.taken() if line.startswith("launch")]
    assert len(lines) == 1 + (splits > 1)
    words = lines[0]
    assert words[:2] == ["launch", "skinny"]
    assert words[words.index("grid") + 1 :][:5] == [str(held), str(splits), str(high), "threads", str(32 * table.warps(count))]
    given = [int(word) for word in words[words.index("arguments") + 1 :]]
    group = packed.scheme.group
    shift = 31 if group is None else group.bit_length() - 1
    assert given[9:] == [tokens, rows, columns, -(-columns // 8) * 8, chunks, groups, shift, 0]
    places = [
        parts["tiles"],
        parts.get("grid", parts["scale"]),
        parts.get("zero"),
        parts.get("table"),
        bias,
        parts.get("tensor_scale"),
        None,
    ]
    if columns % 8 == 0:
        assert given[0] == x.data_ptr()
    assert given[1:8] == [0 if part is None else part.data_ptr() for part in places]
    assert all(place % 16 == 0 for place in given[:4])
    if splits > 1:
        words = lines[1]
        assert words[1] == "finish"
        assert words[words.index("grid") + 1 :][:5] == [str(-(-rows // 256)), str(tokens), "1", "threads", "256"]
        last = [int(word) for word in words[words.index("arguments") + 1 :]]
        assert last[0] == given[8]
        assert last[1:4] == [bias.data_ptr(), given[6], 0]
        assert last[5:] == [tokens, rows, splits, 0]
    assert skinny(kind, count).defines[-2:] == (f"-DNT={count}", f"-DWARPS={table.warps(count)}")


@pytest.mark.parametrize("source", POINTERS)
def test_the_sources_take_as_many_pointers_and_integers_as_they_are_given(source: str) -> None:
    chosen = next(v for v in build.variants("compute_80") if v.source == source)
    try:
        text = nvrtc().compile(f"{source}.cu", chosen.text, headers(), "compute_80", chosen.options).decode()
    except MachineError as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    taken = re.findall(r"\.param \.(\w+)", text.split(".entry")[1].split(")")[0])
    pointers, integers = POINTERS[source]
    assert taken == ["u64"] * pointers + ["u32"] * integers


@pytest.fixture(scope="session")
def images(emulator: Emulator) -> Callable[[Variant], bytes]:
    """Variants compiled for the CPU, as the double of libcuda loads them."""

    def image(variant: Variant) -> bytes:
        name, _ = emulator.kernel(variant.source, variant.defines)
        libraries = (emulator.folder / f"{each}.so" for each in ("emulator", name))
        return " ".join(map(str, (*POINTERS[variant.source], *libraries))).encode()

    return image


@pytest.fixture
def gpu_here(libcuda: Libcuda, images: Callable[[Variant], bytes], monkeypatch: pytest.MonkeyPatch, members: None) -> Libcuda:
    """A GPU whose kernels run here, on tensors of the CPU."""
    monkeypatch.setattr(cubins, "find", lambda variant, capability: cubins.Code("the emulator", images(variant)))
    monkeypatch.setattr(cubins, "origin", lambda variant, capability: "the emulator")
    # Triton has a driver of its own.
    monkeypatch.setattr(gpu, "_MEMBERS", ("cuda", "cublas"))
    return libcuda


def launched(libcuda: Libcuda) -> list[str]:
    return [line.split()[1] for line in libcuda.taken() if line.startswith("launch")]


def near(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether it is x @ dense.T + bias but for one rounding of the result, or two where it lies between."""
    exact = linear(x.double(), dense.double(), None if bias is None else bias.double())
    magnitude = linear(x.double().abs(), dense.double().abs())
    return bool(((found - exact).abs() <= torch.finfo(found.dtype).eps * exact.abs() + 1e-6 * magnitude).all())


@pytest.mark.parametrize(("text", "shape", "dtype"), shared([
    "w4a16g32", "w4a16g128-asym", "w4a16", "w3a16g64", "w2a16g64-asym", "w8a16",
    "fp4g128", "mxfp4", "nvfp4", "fp8", "fp8-tensor", "fp8-block",
], [(33, 200), (16, 4096)], [torch.bfloat16, torch.float16], one_in=4))  # fmt: skip
def test_the_whole_call_computes_what_codes_mean(
    gpu_here: Libcuda, text: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows, columns = shape
    packed = packed_weight(text, rows, columns, dtype=dtype)
    held, dense, bias = prepared("cuda", packed), packed.unpack().dequantize(), torch.randn(rows).to(dtype)
    backend = load_backend("cuda")
    for tokens in (1, 19):
        x = torch.randn(tokens, columns).to(dtype)
        for more in (None, bias):
            assert near(backend.linear(x, held, more, False), x, dense, more)
        split = columns == 4096 and packed.scheme.bits > 3
        assert launched(gpu_here) == (["skinny", "finish"] if split else ["skinny"]) * 2
    found = torch.cat([backend.rows(held, part, dtype) for part in backend.chunks(held, 1 << 12)])
    assert torch.equal(found, dense.to(dtype))
    assert set(launched(gpu_here)) == {"expand"}
    assert torch.equal(torch.cat([backend.rows(held, part, torch.float32) for part in backend.chunks(held)]), dense)
    x = torch.randn(5, columns).to(dtype)
    for more in (None, bias):
        assert near(load_backend("cublas").linear(x, held, more, False), x, dense.to(dtype), more)
    assert set(launched(gpu_here)) == {"expand"}


@pytest.mark.parametrize("text", ["nf4g64", "e3m0g32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_looked_up(gpu_here: Libcuda, text: str, dtype: torch.dtype) -> None:
    packed = packed_weight(text, 40, 264, dtype=dtype)
    held, dense, x = prepared("cuda", packed), packed.unpack().dequantize(), torch.randn(11, 264).to(dtype)
    # The product rounds values of a table to halves first, expanding does not.
    exact, magnitude = linear(x.double(), dense.double()), linear(x.double().abs(), dense.double().abs())
    found = load_backend("cuda").linear(x, held, None, False)
    assert ((found - exact).abs() <= torch.finfo(dtype).eps * (exact.abs() + magnitude)).all()
    backend = load_backend("gpu")
    assert torch.equal(torch.cat([backend.rows(held, part, dtype) for part in backend.chunks(held)]), dense.to(dtype))


@pytest.mark.parametrize("wide", [False, True])
def test_outliers_and_low_rank_factors_are_added(gpu_here: Libcuda, wide: bool) -> None:
    rows, columns = 24, 264
    split = outliers.split(torch.randn(rows, columns).bfloat16(), Outliers(0.02))
    q = nearest(split.rest, Scheme.parse("w4a16g32"), torch.bfloat16).q
    sparse = replace(split.sparse, columns=split.sparse.columns.int()) if wide else split.sparse
    factors = lowrank.Factors(torch.randn(rows, 3).bfloat16(), torch.randn(3, columns).bfloat16(), None)
    q = replace(q, outliers=sparse, lowrank=factors)
    packed = Packed(State(q.scheme, None, Outliers(0.02), Lowrank(3)), rows, columns, pack(q))
    held, dense, bias = prepared("gpu", packed), q.dequantize(), torch.randn(rows).bfloat16()
    for tokens in (1, 13):
        x = torch.randn(tokens, columns).bfloat16()
        exact = linear(x.double(), dense.double(), bias.double())
        for name in ("cuda", "gpu", "cublas"):
            found = load_backend(name).linear(x, held, bias, False)
            assert launched(gpu_here)[-1] == "outliers"
            assert (found - exact).abs().max() <= 2e-2 * exact.abs().max()
    x = torch.randn(13, columns).bfloat16()
    alone, y = replace(packed, state=replace(packed.state, lowrank=None)), torch.zeros(13, rows).bfloat16()
    load_backend("cuda").add_outliers(y, x, held)
    gone = replace(packed.unpack(), outliers=None, lowrank=None).dequantize()
    assert near(y, x, alone.unpack().dequantize() - gone)


@pytest.mark.parametrize("text", ["w4a16g32", "nvfp4", "fp8-tensor"])
def test_stacks_of_experts_in_one_launch(gpu_here: Libcuda, text: str) -> None:
    packed = packed_weight(text, 40, 192, experts=5)
    weight = PackedWeight(packed, torch.bfloat16, backend="gpu")
    held, dense = weight.packed(), packed.unpack().dequantize()
    gpu_here.taken()
    for counts in ([3, 0, 20, 1, 0], [0, 0, 0, 0, 40], [0] * 5):
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        x = torch.randn(sum(counts), 192).bfloat16()
        found = load_backend("cuda").grouped(x, held, offsets)
        assert launched(gpu_here) == (["skinny"] if len(x) else [])
        for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
            assert near(found[start:end], x[start:end], dense[expert])


@pytest.mark.parametrize("capturing", [False, True])
def test_stacks_of_experts_by_gpu(gpu_here: Libcuda, monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    """Many rows go to cublas, which has to know how many there are; but not while a graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    packed = packed_weight("w4a16g32", 16, 128, experts=2)
    weight, dense = PackedWeight(packed, torch.bfloat16, backend="gpu"), packed.unpack().dequantize().bfloat16()
    for counts, expected in (([3, 2], ["skinny"]), ([90, 60], ["skinny"] if capturing else ["expand"] * 2)):
        offsets, x = torch.tensor([0, *counts]).cumsum(0).int(), torch.randn(sum(counts), 128).bfloat16()
        gpu_here.taken()
        found = load_backend("gpu").grouped(x, weight.packed(), offsets)
        assert launched(gpu_here) == expected
        exact = torch.cat([linear(part.double(), dense[e].double()) for e, part in enumerate(x.split(counts))])
        assert (found - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize("columns", [40, 257])
def test_any_strides_and_numbers_of_columns(gpu_here: Libcuda, columns: int) -> None:
    packed = packed_weight("w4a16g32", 17, columns)
    held, dense, backend = prepared("cuda", packed), packed.unpack().dequantize(), load_backend("cuda")
    whole = torch.full((9, 2 * columns + 16), float("nan")).bfloat16()
    whole[:, 8 : columns + 8] = torch.randn(9, columns)
    for x in (whole[:, 8 : columns + 8], whole[:, 8 : columns + 8].T.contiguous().T, whole[3:4, 8 : columns + 8].expand(4, -1)):
        assert near(backend.linear(x, held, None, False), x, dense)
    odd = torch.randn(5 * columns + 1).bfloat16()[1:].view(5, columns)
    assert near(backend.linear(odd, held, None, False), odd, dense)
    assert backend.linear(odd[:0], held, None, False).shape == (0, 17)


def test_gpu_takes_for_each_number_of_tokens_what_the_table_says(gpu_here: Libcuda, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_weight("w4a16g32", 32, 128)
    weight = PackedWeight(packed, torch.bfloat16)
    assert weight.backend == "gpu"
    asked = []
    for name in ("cuda", "cublas"):
        backend = load_backend(name)
        monkeypatch.setattr(backend, "product", lambda *a, name=name, run=backend.product: asked.append(name) or run(*a))
    bias, dense = torch.randn(32).bfloat16(), packed.unpack().dequantize()
    for tokens, name in ((1, "cuda"), (8, "cuda"), (64, "cuda"), (65, "cublas"), (2000, "cublas")):
        x = torch.randn(tokens, 128).bfloat16()
        assert near(weight.linear(x, bias), x, dense.bfloat16() if name == "cublas" else dense, bias)
        assert asked.pop() == name
    for tokens in (3, 70):
        x, more = torch.randn(tokens, 128).bfloat16().requires_grad_(), bias.clone().requires_grad_()
        weight.linear(x, more).sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).bfloat16().expand(tokens, -1), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(more.grad, torch.full((32,), tokens).bfloat16())
    # Twice the same, to the last bit.
    x = torch.randn(19, 128).bfloat16()
    assert torch.equal(weight.linear(x), weight.linear(x))


@pytest.mark.usefixtures("members", "libcuda")
def test_triton_joins_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, asked = load_backend("triton"), []
    monkeypatch.setattr(triton, "refuse", lambda work: None)
    monkeypatch.setattr(triton, "product", lambda x, packed, bias: asked.append(len(x)) or x.new_zeros(len(x), packed.rows))
    monkeypatch.setattr(load_backend("cuda"), "product", lambda x, packed, bias: x.new_zeros(len(x), packed.rows))
    weight = PackedWeight(packed_weight("w4a16g32", 32, 128), torch.bfloat16, backend="gpu")
    for tokens in (8, 9, 1700):
        weight.linear(torch.zeros(tokens, 128).bfloat16())
    assert asked == [9, 1700]
