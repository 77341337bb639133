"""native: every bit where the layout says, backends against the dense product, and the operator under torch's own tools."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from compress.checkpoint.reader import open_checkpoint
from compress.errors import Refusal, UsageError
from compress.kernels import dispatch
from compress.kernels.dispatch import BACKENDS, Work, choose, load_backend, load_format
from compress.kernels.native import int4pack, tiles
from compress.kernels.native.modules import PackedWeight
from compress.kernels.native.packed import Packed, pack
from compress.layerwise.dense_view import DenseView
from compress.numerics import lowrank, outliers, qtensor
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight
from support import page, run, tiny_llama

SCHEMES = [
    "w4a16g32", "w4a16g128", "w4a16", "w5a16g32", "w6a16g64-min", "w4a16g32-min", "w3a16-min", "w4a16g16-asym", "w4a16g64-asym", "w3a16g64", "w3a16g256-asym", "w2a16g32", "w8a16-asym", "w8a16",
    "nf4g64", "nf3g32", "nf2g16", "fp4g128-m2", "e3m0g32", "fp8", "fp8-e5m2", "fp8-tensor", "fp8-block", "mxfp4", "nvfp4",
]  # fmt: skip


def beside(w: torch.Tensor, text: str) -> tuple[State, QTensor]:
    """A matrix or a stack of them in codes, with outliers and low-rank factors."""
    scheme = Scheme.parse(text)
    split = outliers.split(w, Outliers(0.02))
    q = nearest(split.rest, scheme, w.dtype).q
    rest = w.float() - q.dequantize()
    factors = [lowrank.stored(*lowrank.best(m, 3), Lowrank(3, int8=True)) for m in rest.reshape(-1, *w.shape[-2:])]
    parts = [
        torch.stack([getattr(f, n) for f in factors]).view(*w.shape[:-2], *getattr(factors[0], n).shape)
        for n in ("left", "right", "scale")
    ]
    q = replace(q, outliers=split.sparse, lowrank=lowrank.Factors(*parts))
    return State(scheme, None, Outliers(0.02), Lowrank(3, int8=True)), q


def packed_of(text: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[QTensor, Packed]:
    scheme = Scheme.parse(text)
    q = nearest(torch.randn(rows, columns).to(dtype), scheme, dtype).q
    return q, Packed(State(scheme), rows, columns, pack(q))


@pytest.fixture
def without_simd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has no library of CPU kernels, and cannot compile one."""
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(name for name in BACKENDS if name != "simd"))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 257), (40, 520)])
def test_every_code_is_where_the_page_says(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    words = tiles.pack(codes, bits)
    assert words.dtype == torch.int16
    assert words.shape == tiles.shape(*shape, bits)
    found = page()["codes_of"](words.numpy(), bits, *shape)
    assert torch.equal(torch.from_numpy(found), codes)
    # Every bit is one of a code's, and those beyond rows and columns are zero.
    padded = tiles.unpack(words, bits, words.shape[0] * 16, words.shape[1] * tiles.chunk(bits))
    assert int(padded.count_nonzero()) == int(codes.count_nonzero())


@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16g16-asym", "w2a16", "w8a16g64-asym", "w5a16g16", "w6a16g32-min"])
def test_a_stranger_reads_an_artifact_with_the_page_alone(scheme: str, tmp_path: Path) -> None:
    run(tiny_llama(tmp_path / "model"), tmp_path / "out", f"quantize.rtn(scheme={scheme}, ragged=channel) | pack(format=native)")
    artifact, reader = open_checkpoint(tmp_path / "out"), page()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dense_view = DenseView(artifact, rounded=False)
    for name in [f"model.layers.1.{part}.weight" for part in ("self_attn.k_proj", "mlp.down_proj")]:
        parts = {
            part: artifact.read(f"{name}.{part}")
            for part in ("tiles", "rest", "scale", "zero", "minimum")
            if f"{name}.{part}" in artifact.refs
        }
        zero, rest = (parts[part].numpy() if part in parts else None for part in ("zero", "rest"))
        entry, tiled, scale = reader["entry_of"](config, name), parts["tiles"].numpy(), parts["scale"].float().numpy()
        minimum = parts["minimum"].float().numpy() if "minimum" in parts else None
        found = reader["integers"](entry, tiled, scale, zero, rest=rest, minimum=minimum)
        assert torch.equal(torch.from_numpy(found), dense_view.dense(name))


@pytest.mark.parametrize("text", [t for t in SCHEMES if "fp8" not in t and t != "nvfp4"])
@pytest.mark.parametrize("experts", [None, 3])
def test_corrections_come_back(text: str, experts: int | None) -> None:
    shape = (37, 160) if experts is None else (experts, 37, 160)
    if text.endswith("g256-asym"):
        shape = (*shape[:-1], 256)
    state, q = beside(torch.randn(shape).bfloat16(), text)
    weight = Weight("e.w", "BF16", shape, "expert" if experts else "linear")
    fmt = load_format("native")()
    tensors = fmt.encode(weight, q)
    assert {s.name: (s.shape, s.nbytes) for s in fmt.specs(weight, state)} == {
        n: (tuple(t.shape), t.nbytes) for n, t in tensors.items()
    }
    canonical, back = qtensor.encode(weight, q), fmt.decode(weight, state, tensors)
    assert all(torch.equal(t, canonical[n]) for n, t in qtensor.encode(weight, back).items())
    copied = fmt.copies(weight, state)
    assert {name.rpartition(".")[2] for name in copied} >= {"outlier_values", "left", "rank_scale"}
    assert all(torch.equal(tensors[there].view(torch.uint8), canonical[here].view(torch.uint8)) for there, here in copied.items())
    # By rows, in the middle, and out of order.
    packed, dense = Packed(state, *shape[-2:], pack(q)), q.dequantize()
    index = torch.tensor([36, 3, 3, 0])
    for part, whole in [(packed, dense)] if experts is None else [(packed.expert(e), dense[e]) for e in range(experts)]:
        assert torch.equal(part.take(slice(16, 37)).dequantize(), whole[16:37])
        assert torch.equal(part.take(index).dequantize(), whole[index])


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shape", [(48, 256), (33, 256), (272, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_multiply_by_what_codes_mean(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    q, packed = packed_of(text, *shape)
    bias, dense = torch.randn(shape[0]).to(dtype), q.dequantize()
    for tokens in (1, 16, 65):
        x = torch.randn(tokens, shape[1]).to(dtype)
        exact = linear(x.double(), dense.double(), bias.double())
        for name in BACKENDS:
            backend = load_backend(name)
            try:
                backend.refuse(Work(packed.state, *shape, dtype, packed.parts["scale"].dtype, "cpu", asked=True))
            except Refusal:
                assert name not in ("cpu", "reference")
                continue
            held = Packed(packed.state, *shape, backend.prepare(packed))
            found = backend.linear(x, held, bias, False)
            assert found.dtype == dtype
            allowed = 2e-2 if dtype == torch.bfloat16 or backend.rounds_inputs else 2e-6
            assert (found - exact).abs().max() <= allowed * exact.abs().max()
            again = torch.cat([backend.rows(held, rows, torch.float32) for rows in backend.chunks(held)])
            assert torch.equal(again, dense)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.usefixtures("without_simd")
def test_int4pack_runs_w4_in_bf16_and_says_why_not(group: int, caplog: pytest.LogCaptureFixture) -> None:
    _, packed = packed_of(f"w4a16g{group}", 80, 512)
    work = Work(packed.state, 80, 512, torch.bfloat16, torch.bfloat16, "cpu")
    assert choose(work).name == "int4pack"
    weight = PackedWeight(packed, torch.bfloat16)
    # Beside codes as large as before, a zero for every scale.
    assert sum(b.nbytes for b in weight.buffers()) == 80 * 512 // 2 + 2 * packed.parts["scale"].nbytes
    narrow = replace(work, state=State(Scheme.parse(f"w3a16g{group}")))
    wider = replace(work, state=State(Scheme.parse(f"w8a16g{group}")))
    for other, said in [
        (wider, "not w4 in groups"), (replace(work, dtype=torch.float32), "not in bfloat16"),
        (replace(work, scales=torch.float16), "not in bfloat16"), (replace(work, rows=81), "do not divide 81 x 512"),
        (replace(work, looked_up=True, multiplied=False), "looked up"), (replace(work, turned=True), "Conv1D"),
        (replace(work, device="cuda"), "lies on cuda"), (replace(work, state=replace(work.state, outliers=Outliers(0.1))), "outliers"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=said):
            choose(other, "int4pack")
    dispatch.tell_once.cache_clear()
    with caplog.at_level(logging.INFO, "compress"):
        assert choose(wider).name == choose(wider).name == choose(narrow).name == "cpu"
    assert choose(narrow, "int4pack").name == "int4pack"
    told = [record.message for record in caplog.records if "int4pack" in record.message]
    assert told == [
        f"backend int4pack is passed over: {reason}"
        for reason in (f"w8a16g{group} is not w4 in groups of 32, 64, 128, 256", f"w3a16g{group} would take 4 bits in memory")
    ]
    with pytest.raises(UsageError, match="did you mean 'cpu'"):
        choose(work, "cpux")


@pytest.mark.parametrize("text", ["w4a16g32", "w4a16g64-asym"])
@pytest.mark.usefixtures("without_simd")
def test_a_head_that_is_tied_to_an_embedding_runs_by_int4pack(text: str) -> None:
    q, packed = packed_of(text, 208, 128)
    weight = PackedWeight(packed, torch.bfloat16, looked_up=True)
    assert weight.backend == "int4pack"
    assert PackedWeight(packed, torch.bfloat16, looked_up=True, multiplied=False).backend == "cpu"
    ids = torch.tensor([[3, 207, 64], [3, 63, 0]])
    assert torch.equal(weight.lookup(ids), q.dequantize().bfloat16()[ids])
    assert weight.lookup(ids[:, :0]).shape == (2, 0, 128)


@pytest.mark.usefixtures("without_simd")
def test_int8pack_runs_rows_of_w8_and_says_why_not() -> None:
    _, packed = packed_of("w8a16", 41, 96)
    work = Work(packed.state, 41, 96, torch.bfloat16, torch.bfloat16, "cpu")
    weight = PackedWeight(packed, torch.bfloat16)
    assert weight.backend == "int8pack"
    assert sum(b.nbytes for b in weight.buffers()) == 41 * 96 + 2 * 41
    for other, said in [
        (replace(work, state=State(Scheme.parse("w8a16g32"))), "a scale per row"), (replace(work, looked_up=True), "looked up"),
        (replace(work, dtype=torch.float16), "not in bfloat16"), (replace(work, turned=True), "Conv1D"),
        (replace(work, state=replace(work.state, lowrank=Lowrank(3))), "low-rank"), (replace(work, columns=1160), "divide 1160"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=said):
            choose(other, "int8pack")


def test_zero_points_far_off_cost_int4pack_no_precision() -> None:
    """Weights that are all positive: bf16 holds 2^-9 of what zero points add, the rest is added."""
    scheme, w = Scheme.parse("w4a16g64-asym"), (torch.rand(64, 256) / 8 + 2).bfloat16()
    packed = Packed(State(scheme), 64, 256, pack(nearest(w, scheme, torch.bfloat16).q))
    weight, x = PackedWeight(packed, torch.bfloat16, backend="int4pack"), torch.randn(4, 256).bfloat16()
    exact = x.double() @ packed.unpack().dequantize().double().T
    assert (weight.linear(x) - exact).abs().max() <= 2.0**-8 * exact.abs().max()


@pytest.mark.parametrize("text", ["w4a16g32", "w3a16g64-asym", "fp8-tensor"])
@pytest.mark.usefixtures("without_simd")
def test_a_stack_of_experts_is_run_matrix_by_matrix(text: str) -> None:
    scheme = Scheme.parse(text)
    q = nearest(torch.randn(3, 80, 128).bfloat16(), scheme, torch.bfloat16).q
    packed = Packed(State(scheme), 80, 128, pack(q))
    weight, plain = PackedWeight(packed, torch.bfloat16), PackedWeight(packed, torch.bfloat16, backend="reference")
    assert weight.backend == ("int4pack" if text == "w4a16g32" else "cpu")
    for expert in range(3):
        x = torch.randn(5, 128).bfloat16()
        assert torch.equal(weight.dense(expert), q.dequantize()[expert].bfloat16())
        torch.testing.assert_close(weight.linear(x, None, expert), plain.linear(x, None, expert), rtol=2e-2, atol=0.2)


def test_an_order_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = packed_of("w4a16g32", 64, 64)
    straight = int4pack._pack
    int4pack._known.cache_clear()
    monkeypatch.setattr(int4pack, "_pack", lambda codes: straight(codes.roll(1, 1)))
    with pytest.raises(UsageError, match="order that is not known"):
        PackedWeight(packed, torch.bfloat16, backend="int4pack")
    int4pack._known.cache_clear()


@pytest.mark.parametrize("text", ["w4a16g32", "w3a16g32-asym", "nf4g16", "fp8-block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_under_torchs_own_checks(text: str, dtype: torch.dtype) -> None:
    q, packed = packed_of(text, 48, 192)
    weight = PackedWeight(packed, dtype)
    x, bias = torch.randn(3, 5, 192, dtype=dtype, requires_grad=True), torch.randn(48, dtype=dtype, requires_grad=True)
    parts = [weight.get_buffer(name) for name in weight.names.split(",")]
    arguments = (parts, weight.names, weight.state, *weight.size, weight.turned, weight.backend)
    torch.library.opcheck(torch.ops.compress.packed_linear.default, (x, bias, *arguments))
    gradient = torch.randn(3, 5, 48, dtype=dtype)
    torch.library.opcheck(torch.ops.compress.packed_input_gradient.default, (gradient, *arguments))
    weight.linear(x, bias).backward(gradient)
    assert x.grad is not None
    assert bias.grad is not None
    wanted = gradient.double() @ q.dequantize().double()
    assert (x.grad - wanted).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * wanted.abs().max()
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)), rtol=2e-2, atol=5e-2 if dtype == torch.bfloat16 else 1e-5)
    assert weight.linear(x[:0]).shape == (0, 5, 48)


class _Net(torch.nn.Module):
    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.w = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.w.linear(x)) + 1


@pytest.mark.parametrize("text", ["w4a16g32", "nvfp4"])
def test_it_compiles_whole_and_exports(text: str) -> None:
    _, packed = packed_of(text, 48, 192)
    net = _Net(PackedWeight(packed, torch.bfloat16))
    x, other = torch.randn(4, 192).bfloat16(), torch.randn(9, 192).bfloat16()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), net(x))
    assert torch.equal(compiled(other), net(other))
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},)).module()
    assert torch.equal(exported(other), net(other))


def test_a_weight_moves_and_is_not_cast() -> None:
    q, packed = packed_of("nvfp4", 32, 64)
    weight = PackedWeight(packed, torch.float32)
    kinds = {name: part.dtype for name, part in weight.named_buffers() if name != "like"}
    weight.to(torch.float16)
    assert {name: part.dtype for name, part in weight.named_buffers() if name != "like"} == kinds
    assert torch.equal(weight.dense(), q.dequantize().half())


@pytest.mark.parametrize(
    ("weight", "scheme", "said"),
    [
        (Weight("a.weight", "BF16", (32, 96), "linear"), "w4a16g48", "not of 48"),
        (Weight("a.weight", "BF16", (32, 96), "linear"), "w4a16g8", "not of 8"),
        (Weight("a.weight", "BF16", (32, 96), "linear", converted=True), "w4a16g32", "splits or permutes"),
        (Weight("a.table", "BF16", (32, 96), "linear", attribute="table"), "w4a16g32", "`table` of its module"),
    ],
)
def test_refusals(weight: Weight, scheme: str, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        load_format("native")().refuse(weight, State(Scheme.parse(scheme)))
