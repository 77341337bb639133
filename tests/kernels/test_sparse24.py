"""2:4 in the native format: what is kept and where, artifacts that mean the same, and torch's own sparse product."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear
from torch.sparse import _semi_structured_conversions as conversions

import compress
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import FormatError, InputError, Refusal
from compress.evaluate.verify import verify_bytes
from compress.kernels.cuda import device
from compress.kernels.cuda.cubins import Capability
from compress.kernels.dispatch import BACKENDS, Work, load_backend, load_format
from compress.kernels.native import layout, semi_structured, sparse, tiles
from compress.kernels.native.fused import scales
from compress.kernels.native.modules import PackedWeight
from compress.kernels.native.packed import Packed, groups_of, pack
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.numerics import masks, qtensor
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.runtime import artifact
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight
from families import build as build_family
from support import CALIBRATE, SHARED, each_is_refused, logits, page, run, shared, tiny_llama

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SHAPES = [(1, 4), (16, 64), (17, 68), (40, 256), (33, 260), (48, 1024), (3, 20, 132), (2, 16, 512)]
MASKED = "prune.magnitude(sparsity=2:4)"
NATIVE = "pack(format=native)"


def pruned(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Two of four of random values, and among them what is odd: groups of zeros, one that is not, zeros with a sign."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    w = w * masks.keep_best(w.float().abs(), sparse.PATTERN)
    fours = w.view(-1, 4)
    fours[::7], fours[3::11, :3], fours[5::13] = 0, 0, torch.where(fours[5::13] == 0, -0.0, fours[5::13])
    return w


def coded(w: torch.Tensor, text: str) -> QTensor:
    return nearest(w, Scheme.parse(text), w.dtype).q


def slow(parts: dict[str, torch.Tensor], rows: int, columns: int, zero: int) -> torch.Tensor:
    """The layout as its file tells it, entry by entry."""
    held, indices = parts["tiles"], parts["indices"]
    planes = indices.shape[-1] // 4
    out = torch.full((rows, columns), zero, dtype=torch.uint8 if planes == 4 else held.dtype)
    for n in range(rows):
        for j in range(columns // 2):
            c, at = divmod(j, 32 * planes)
            (p, r), tile, row = divmod(at, 32), n // 16, n % 16
            word = held[tile, c, row, r]
            place = int(indices[tile, c, row, planes * (r // 8) + p]) >> 2 * (r % 8) & 3
            out[n, 4 * (j // 2) + place] = int(word) >> 4 * p & 15 if planes == 4 else word
    return out


@pytest.mark.parametrize(("shape", "dtype", "scheme"), shared(SHAPES, list(DTYPES), [None, "w4a16g32", "w4a16"]))
def test_what_is_kept_comes_back_to_its_place(shape: tuple[int, ...], dtype: torch.dtype, scheme: str | None) -> None:
    w = pruned(*shape, dtype=dtype)
    if scheme is None:
        entries, zero = w, 0
    else:
        entries, zero = coded(w, "w4a16" if shape[-1] % 32 else scheme).codes, 8
    parts = sparse.pack(entries, zero)
    assert torch.equal(sparse.unpack(parts, *shape[-2:], zero), entries)
    assert sparse.sound(parts["indices"])
    experts = [({n: p[e] for n, p in parts.items()}, entries[e]) for e in range(shape[0])] if len(shape) == 3 else []
    index = torch.tensor([shape[-2] - 1, 0, 0])
    for part, whole in experts or [(parts, entries)]:
        assert torch.equal(slow(part, *shape[-2:], zero), whole)
        assert torch.equal(sparse.take(part, index, shape[-1], zero), whole[index])
        assert torch.equal(sparse.take(part, slice(0, 1), shape[-1], zero), whole[:1])
    # Packing again what came back gives the same bytes, whichever zeros were there.
    again = sparse.pack(sparse.unpack(parts, *shape[-2:], zero), zero)
    assert all(torch.equal(again[name].view(torch.int16), part.view(torch.int16)) for name, part in parts.items())
    # Beyond rows and columns there are zero bits, and places 0 and 1.
    held = parts["tiles"] if scheme is None else tiles.split(parts["tiles"], 4)
    assert int(held.count_nonzero()) <= entries.numel() // 2
    assert int((parts["indices"][..., -1, -1, -1, -1] if shape[-2] % 16 else torch.tensor([0x4444])).flatten()[0]) == 0x4444


def test_the_first_pair_of_places_that_covers_is_taken() -> None:
    held = torch.tensor([[bool(bits >> i & 1) for i in range(4)] for bits in range(16) if bits.bit_count() < 3]).float()
    pairs = [int(sparse.pack(four[None], 0)["indices"].flatten()[0]) & 0xF for four in held]
    # Of none, 0, 1, 0 1, 2, 0 2, 1 2, 3, 0 3, 1 3, 2 3: the lower place in the low bits.
    assert pairs == [0b0100, 0b0100, 0b0100, 0b0100, 0b1000, 0b1000, 0b1001, 0b1100, 0b1100, 0b1101, 0b1110]


@pytest.mark.parametrize("scheme", [None, "w4a16g32"])
def test_more_than_two_of_four_are_refused_by_name_and_place(scheme: str | None) -> None:
    w = pruned(3, 40, 256)
    w[1, 37, 128:131] = 1
    value = w if scheme is None else coded(w, scheme)
    state = State(Scheme.parse(scheme) if scheme else None, sparse.PATTERN)
    weight = Weight("a.experts", "BF16", (3, 40, 256), "expert")
    with pytest.raises(InputError, match=r"'a.experts', expert 1, row 37, columns 128 to 131") as error:
        load_format("native")().encode_as(weight, state, value)
    assert f"as {state} says" in str(error.value)
    weight, value = replace(weight, shape=(40, 256)), w[1] if scheme is None else coded(w[1], scheme)
    with pytest.raises(InputError, match=r"'a.experts', row 37"):
        load_format("native")().encode_as(weight, state, value)


def weight_of(*shape: int, dtype: str = "BF16", **more: Any) -> Weight:
    return Weight("m.weight", dtype, shape, **{"kind": "linear" if len(shape) == 2 else "expert", **more})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "text", ["masked(2:4)", "codes(w4a16g32)+masked(2:4)", "codes(w4a16)+masked(2:4)", "codes(w4a8g128)+masked(2:4)"]
)
@pytest.mark.parametrize("shape", [(33, 256), (48, 512), (31, 1024), (3, 30, 512)])
def test_the_format_writes_what_it_says(dtype: torch.dtype, text: str, shape: tuple[int, ...]) -> None:
    fmt, state, weight = load_format("native")(), State.parse(text), weight_of(*shape, dtype=DTYPES[dtype])
    w = pruned(*shape, dtype=dtype)
    value: Any = w if state.scheme is None else coded(w, str(state.scheme))
    tensors, said = fmt.encode_as(weight, state, value), fmt.specs(weight, state)
    assert {s.name: (s.shape, s.nbytes) for s in said} == {n: (tuple(t.shape), t.nbytes) for n, t in tensors.items()}
    assert "m.weight.indices" in tensors
    assert not fmt.copies(weight, state)
    back = fmt.decode(weight, state, tensors)
    if isinstance(back, QTensor):
        assert all(torch.equal(t, qtensor.encode(weight, value)[n]) for n, t in qtensor.encode(weight, back).items())
    else:
        assert torch.equal(back, w)
    tensors["m.weight.indices"] |= -1
    with pytest.raises(InputError, match="two places in each four columns"):
        fmt.decode(weight, state, tensors)


@pytest.mark.parametrize(
    ("state", "changes", "said"),
    [
        ("masked(2:4)", {"shape": (64, 256), "transposed": True}, "Conv1D"),
        ("masked(2:4)", {"shape": (64, 258)}, "4 does not divide its 258"),
        ("masked(2:4)", {"converted": True}, "while loading"),
        ("masked(2:4)", {"attribute": "table"}, "nothing packed can be put"),
        ("masked(2:4)", {"kind": "router"}, "no matrix of floats"),
        ("masked(2:4)", {"dtype": "F64"}, "no matrix of floats"),
        ("masked(2:4)", {"shape": (64, 4)}, "take no less"),
        ("masked(0.5)", {}, "not 2:4"),
        ("masked(4:8)", {}, "not 2:4"),
        ("dense", {}, "not 2:4"),
        ("codes(w4a16g16)+masked(2:4)", {}, "less than a sparse product takes"),
        ("codes(w3a16g32)+masked(2:4)", {}, "not symmetric w4"),
        ("codes(w4a16g32-asym)+masked(2:4)", {}, "not symmetric w4"),
        ("codes(w4a16g32)+masked(2:4)", {"shape": (64, 128)}, "take no less"),
        ("codes(w4a16g32)+masked(2:4)+outliers(0.01)", {}, "beside its codes"),
        ("codes(w4a16g32)+masked(2:4)+lowrank(r4)", {}, "beside its codes"),
    ],
)
def test_what_stays_whole_says_why(state: str, changes: dict[str, Any], said: str) -> None:
    fmt, found = load_format("native")(), State.parse(state)
    weight = replace(weight_of(64, 256), **changes)
    assert "m.weight.indices" not in {spec.name for spec in fmt.specs(weight, found)}
    if found.scheme is None:
        assert said in fmt.plain(weight, found)
        assert [spec.name for spec in fmt.specs(weight, found)] == ["m.weight"]
    else:
        notes = fmt.notes([weight], {weight.name: found})
        assert [said in note.reason for note in notes] == [True]


@pytest.mark.parametrize("text", [None, "w4a16g32", "w4a16"])
@pytest.mark.parametrize("shape", [(48, 256), (33, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_multiply_by_what_is_kept(text: str | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = pruned(*shape, dtype=dtype)
    if text is None:
        packed, dense = Packed(State(None, sparse.PATTERN), *shape, sparse.pack(w, 0)), w
    else:
        q = coded(w, text)
        packed, dense = Packed(State(q.scheme, sparse.PATTERN), *shape, pack(q, halved=True)), q.dequantize()
    held = packed.parts.get("scale", packed.parts["tiles"]).dtype
    x, bias, ran = torch.randn(5, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype), []
    exact = linear(x.double(), dense.double(), bias.double())
    for name in BACKENDS:
        backend = load_backend(name)
        try:
            backend.refuse(Work(packed.state, *shape, dtype, held, "cpu"))
        except Refusal:
            continue
        ran.append(name)
        kept = Packed(packed.state, *shape, backend.prepare(packed))
        found = backend.linear(x, kept, bias, False)
        assert (found - exact).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 2e-6) * exact.abs().max()
        again = torch.cat([backend.rows(kept, rows, torch.float32) for rows in backend.chunks(kept)])
        assert torch.equal(again, dense.float())
    assert {"cpu", "reference"} <= set(ran)


def test_fused_kernels_get_the_whole_of_what_they_read() -> None:
    """Those that read tiles as they lie: the same bytes as if no half had been left out."""
    q = coded(pruned(40, 384), "w4a16g128")
    whole = Packed(State(q.scheme), 40, 384, pack(q))
    halved = Packed(State(q.scheme, sparse.PATTERN), 40, 384, pack(q, halved=True))
    assert groups_of(q.scheme, 384, halved=True) == 4
    assert scales(halved).shape == (3, 4, 16)
    for found in (halved.whole(), whole.whole()):
        assert found.parts.keys() == whole.parts.keys()
        assert all(torch.equal(part, whole.parts[name]) for name, part in found.parts.items())


@pytest.mark.parametrize("text", [None, "w4a16g64"])
def test_rows_are_looked_up_and_experts_run(text: str | None) -> None:
    w = pruned(3, 48, 256)
    q = None if text is None else coded(w, text)
    state = State(None if q is None else q.scheme, sparse.PATTERN)
    parts, dense = (sparse.pack(w, 0), w) if q is None else (pack(q, halved=True), q.dequantize().bfloat16())
    weight = PackedWeight(Packed(state, 48, 256, parts), torch.bfloat16)
    for expert in range(3):
        assert torch.equal(weight.dense(expert), dense[expert])
        x = torch.randn(5, 256).bfloat16()
        torch.testing.assert_close(weight.linear(x, None, expert), linear(x, dense[expert]), rtol=2e-2, atol=0.2)
    table = PackedWeight(Packed(state, 48, 256, {n: p[1] for n, p in parts.items()}), torch.bfloat16, looked_up=True)
    ids = torch.tensor([[47, 0, 16], [16, 3, 3]])
    assert torch.equal(table.lookup(ids), dense[1][ids])
    x = torch.randn(2, 5, 256, dtype=torch.bfloat16, requires_grad=True)
    table.linear(x).backward(gradient := torch.randn(2, 5, 48).bfloat16())
    torch.testing.assert_close(x.grad, gradient @ dense[1], rtol=2e-2, atol=0.2)


SIZES = {"hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        (MASKED, 9),
        (f"{MASKED} | quantize.rtn(scheme=w4a16g128)", 3.125),
        (f"{MASKED} | quantize.rtn(scheme=w4a16g32)", 3.5),
        (f"{MASKED} | quantize.rtn(scheme=w4a8g128, targets=[attention])", None),
    ],
)
def test_an_artifact_means_and_takes_what_was_planned(recipe: str, bits: float | None, tmp_path: Path) -> None:
    source, out = tiny_llama(tmp_path / "model", **SIZES), tmp_path / "out"
    result = run(source, out, f"{recipe} | {NATIVE}")
    assert {record.bits for record in result.manifest.weights.values()} == ({bits} if bits else {3.125, 9.0})
    step, stored = result.plan.steps[-1], open_checkpoint(out)
    assert step.payload_bytes == stored.nbytes
    assert step.disk_bytes == sum((out / file).stat().st_size for file in ("model.safetensors", "config.json"))
    dense_view = logits(build(stored, rounded=False))
    assert torch.equal(logits(compress.load(out, "float32", backend="cpu")), dense_view)
    # Where activations are rounded, the last bit of a sum may decide which way.
    torch.testing.assert_close(logits(compress.load(out, "float32")), dense_view, rtol=0, atol=1e-5 if bits else 1e-2)
    half = logits(compress.load(out, "bfloat16"))
    assert (half - dense_view).norm() < 2e-2 * dense_view.norm()
    assert verify_bytes(stored, Context()).decoded == len(result.manifest.weights) == 14
    # Without its manifest, by what config.json says; and back to what it was packed from.
    (out / "manifest.json").unlink()
    assert torch.equal(logits(build(open_checkpoint(out), rounded=False)), dense_view)
    run(out, tmp_path / "back", f"unpack | {NATIVE}")
    assert open_checkpoint(tmp_path / "back").config == stored.config
    for name in stored.refs:
        assert torch.equal(open_checkpoint(tmp_path / "back").read(name), stored.read(name))
    run(out, tmp_path / "dense", "unpack(to=dense)")
    if bits == 9:
        assert torch.equal(logits(build(open_checkpoint(tmp_path / "dense"), rounded=False)), dense_view)


@pytest.mark.parametrize("name", ["tied", "mixtral", "gpt_oss", "deepseek_v3", "llama4", "granitemoe", "t5", "falcon", "gpt2"])
@pytest.mark.parametrize("then", ["", "| quantize.rtn(scheme=w4a16g32) "])
def test_families(name: str, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if their rows were long enough to take less.
    monkeypatch.setattr(layout, "payload_bytes", lambda specs: -len(specs))
    source, recipe = build_family(name, tmp_path), f"{MASKED} {then}| {NATIVE}"
    if name == "gpt2" and not then:
        with pytest.raises(FormatError, match="nothing to pack"):
            run(source, tmp_path / "out", recipe)
        return
    result = run(source, tmp_path / "out", recipe)
    stored = open_checkpoint(tmp_path / "out")
    model, weights = compress.load(tmp_path / "out", "float32"), DenseView(stored).weights
    torch.testing.assert_close(logits(model), logits(build(stored, rounded=False)), rtol=0, atol=1e-5)
    assert sum(artifact.backends(model).values()) == len(weights)
    # What is not halved is counted.
    whole = {name: note.reason for note in result.manifest.notes if note.what in ("zeros", "plain") for name in note.names}
    assert {weight for weight in result.manifest.weights if f"{weight}.indices" not in stored.refs} == whole.keys()
    assert all("Conv1D" in reason for reason in whole.values()) if name == "gpt2" else not whole


def test_a_stranger_reads_half_of_a_weight_with_the_page_alone(tmp_path: Path) -> None:
    recipe = f"{MASKED} | quantize.rtn(scheme=w4a16g32, targets=[mlp]) | {NATIVE}"
    run(tiny_llama(tmp_path / "model", **{**SIZES, "intermediate_size": 480}), tmp_path / "out", recipe)
    stored, reader = open_checkpoint(tmp_path / "out"), page()
    dense_view = DenseView(stored, rounded=False)
    for name in [f"model.layers.1.{part}.weight" for part in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")]:
        entry = reader["entry_of"](stored.config, name)
        tiles, indices = (stored.read(f"{name}.{part}") for part in ("tiles", "indices"))
        if entry["state"] == "masked(2:4)":
            found = reader["values"](entry, tiles.float().numpy(), indices.numpy())
        else:
            scale = stored.read(f"{name}.scale").float().numpy()
            found = reader["integers"](entry, tiles.numpy(), scale, None, indices.numpy())
        assert torch.equal(torch.from_numpy(found), dense_view.dense(name).float())


def test_artifacts_with_all_of_their_zeros_are_read_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were written before half of a weight could be left out: the same states, in version 1."""
    source, recipe = tiny_llama(tmp_path / "model", **SIZES), f"{MASKED} | quantize.rtn(scheme=w4a16g128) | {NATIVE}"
    with monkeypatch.context() as patched:
        patched.setattr(sparse, "stays", lambda weight, state: "not yet")
        run(source, tmp_path / "old", recipe)
    run(source, tmp_path / "new", recipe)
    old, new = open_checkpoint(tmp_path / "old"), open_checkpoint(tmp_path / "new")
    assert [c.config["quantization_config"].pop("version") for c in (old, new)] == [1, 2]
    assert old.config == new.config
    assert not any(name.endswith(".indices") for name in old.refs)
    for manifest in (True, False):
        for out in (tmp_path / "old", tmp_path / "new"):
            if not manifest:
                (out / "manifest.json").unlink()
            assert verify_bytes(open_checkpoint(out), Context()).decoded == 14
        first, second = (logits(compress.load(tmp_path / name, "float32")) for name in ("old", "new"))
        assert torch.equal(first, second)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("scheme", ["", "| quantize.rtn(scheme=w4a16g128) "])
def test_what_was_cut_or_taken_away_is_an_error(told: bool, scheme: str, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj.weight"
    run(tiny_llama(tmp_path / "model", **SIZES), out, f"{MASKED} {scheme}| {NATIVE}")
    whole = load_file(out / "model.safetensors")
    manifest = Manifest.read(out)
    assert manifest is not None
    (out / "manifest.json").unlink()
    cut = {
        "indices of 31 tiles": {f"{name}.indices": whole[f"{name}.indices"][:-1].clone()},
        "tiles of 31 tiles": {f"{name}.tiles": whole[f"{name}.tiles"][:-1].clone()},
        "other indices": {f"{name}.indices": whole[f"{name}.indices"].int()},
        "no indices": {f"{name}.indices": None},
        "no tiles": {f"{name}.tiles": None},
    }
    each_is_refused(cut, whole, out, name, manifest if told else None)


def test_a_version_that_is_not_known_is_refused(tmp_path: Path) -> None:
    run(tiny_llama(tmp_path / "model", **SIZES), tmp_path / "out", f"{MASKED} | {NATIVE}")
    (tmp_path / "out" / "manifest.json").unlink()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["version"] = 7
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="version 1, 2, 3, 4, 5, 6"):
        compress.load(tmp_path / "out")


@pytest.mark.parametrize(("then", "halved"), [("", 35), (" | quantize.gptq(scheme=w4a16g32, ragged=channel)", 5)])
def test_a_trained_model_from_end_to_end(then: str, halved: int, tmp_path: Path) -> None:
    if not (source := SHARED / "models" / "stories260k").is_dir():
        pytest.skip("no trained models beside this checkout")
    result = run(source, tmp_path / "out", f"{CALIBRATE} | prune.wanda(sparsity=2:4){then} | {NATIVE}")
    stored = open_checkpoint(tmp_path / "out")
    assert result.plan.steps[-1].payload_bytes == stored.nbytes
    assert sum(name.endswith(".indices") for name in stored.refs) == halved
    assert torch.equal(logits(compress.load(tmp_path / "out", "float32", backend="cpu")), logits(build(stored, rounded=False)))
    assert verify_bytes(stored, Context()).decoded == 35


# The sparse units of a GPU, by torch's own conversions.


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 8.6, whose products are computed from what CUTLASS would be given."""

    def mm(kept: torch.Tensor, places: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        assert inputs.shape[1] % 8 == 0
        return conversions.sparse_semi_structured_to_dense_cutlass(kept, places) @ inputs

    as_gpu(monkeypatch, (8, 6))
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda bias, *rest: bias[:, None] + mm(*rest))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 9.0 with cuSPARSELt: what that keeps is nobody's business, so here it is the matrix itself."""

    def mm(compressed: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert inputs.shape[1] % 8 == 0
        return compressed @ inputs + (0 if bias is None else bias[:, None])

    as_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", mm)


def as_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(device, "usable", lambda kind: Capability(*capability))
    monkeypatch.setattr(device, "capability", lambda number: capability)


@pytest.mark.parametrize("gpu", ["ampere", "hopper"])
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (128, 1024)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_sparse_product_gets_what_it_wants(
    gpu: str, shape: tuple[int, int], dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(gpu)
    w, backend = pruned(*shape, dtype=dtype), load_backend("semi_structured")
    packed = Packed(State(None, sparse.PATTERN), *shape, sparse.pack(w, 0))
    backend.refuse(Work(packed.state, *shape, dtype, dtype, "cuda"))
    held = Packed(packed.state, *shape, backend.prepare(packed))
    if gpu == "ampere":
        kept, places = held.parts["kept"], held.parts["places"]
        assert sum(part.nbytes for part in held.parts.values()) * 16 == 9 * w.nbytes
        assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(kept, places), w)
    assert torch.equal(torch.cat([backend.rows(held, rows, torch.float32) for rows in backend.chunks(held, 4096)]), w.float())
    bias = torch.randn(shape[0]).to(dtype)
    for tokens in (1, 8, 21):
        x = torch.randn(tokens, shape[1]).to(dtype)
        for b in (None, bias):
            found = backend.linear(x, held, b, False)
            assert found.is_contiguous()
            torch.testing.assert_close(found, linear(x, w, b), rtol=2e-2, atol=0.2)


def test_the_order_of_cutlass_is_that_of_torch() -> None:
    """Where nothing is odd both choose the same places, so words are equal bit for bit."""
    w = torch.randn(160, 320).half()
    w = w * masks.keep_best(w.float().abs(), sparse.PATTERN)
    kept, places = conversions.sparse_semi_structured_from_dense_cutlass(w)
    parts = sparse.pack(w, 0)
    indices = tiles.by_rows(parts["indices"], slice(0, 160)).flatten(1)
    assert torch.equal(semi_structured.reordered(indices), places)
    assert torch.equal(tiles.by_rows(parts["tiles"], slice(0, 160)).flatten(1), kept)
    assert torch.equal(semi_structured.ordered(places, slice(32, 128)), indices[32:128])


def test_semi_structured_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, half = load_backend("semi_structured"), torch.float16
    work = Work(State(None, sparse.PATTERN), 64, 128, half, half, "cuda")
    as_gpu(monkeypatch, (8, 0))
    backend.refuse(work)
    for other, said in [
        (replace(work, state=State(Scheme.parse("w4a16g32"), sparse.PATTERN)), "in codes"),
        (replace(work, dtype=torch.bfloat16), "weight is in float16 and activations in bfloat16"),
        (replace(work, dtype=torch.float32, scales=torch.float32), "in float32"), (replace(work, rows=48), "do not divide 48 x 128"),
        (replace(work, columns=96), "do not divide 64 x 96"), (replace(work, turned=True), "added up"),
        (replace(work, looked_up=True), "looked up"),
    ]:  # fmt: skip
        with pytest.raises(Refusal, match=said):
            backend.refuse(other)
    as_gpu(monkeypatch, (9, 0))
    with pytest.raises(Refusal, match="no cuSPARSELt"):
        backend.refuse(work)
    as_gpu(monkeypatch, (7, 5))
    with pytest.raises(Refusal, match=r"capability 7\.5 has no sparse units"):
        backend.refuse(work)
    monkeypatch.undo()
    with pytest.raises(Refusal, match="the weight lies on cpu"):
        backend.refuse(replace(work, device="cpu"))


@pytest.mark.parametrize("gpu", ["ampere", "hopper"])
def test_the_operator_runs_it(gpu: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(gpu)
    w = pruned(3, 64, 128)
    packed = Packed(State(None, sparse.PATTERN), 64, 128, sparse.pack(w, 0))
    weight = PackedWeight(packed, torch.bfloat16)
    assert weight.backend == "semi_structured"
    for expert in range(3):
        x = torch.randn(3, 5, 128, dtype=torch.bfloat16, requires_grad=True)
        found, wanted = weight.linear(x, None, expert), linear(x, w[expert])
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0.2)
        assert torch.equal(weight.dense(expert), w[expert])
        found.backward(gradient := torch.randn(3, 5, 64).bfloat16())
        torch.testing.assert_close(x.grad, gradient @ w[expert], rtol=2e-2, atol=0.2)
    x, offsets = torch.randn(7, 128).bfloat16(), torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    wanted = torch.cat([linear(x[:2], w[0]), linear(x[2:], w[2])])
    torch.testing.assert_close(weight.grouped(x, offsets), wanted, rtol=2e-2, atol=0.2)
