"""gguf: names and bytes as llama.cpp has them, codes that come back bit for bit, refusals in words.

llama.cpp itself is run in tests/evaluate/readers/test_llama_cpp.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.reader import GGUF_FILE, open_checkpoint
from compress.errors import FormatError, Refusal
from compress.importers.gguf_names import ARCHITECTURES, from_pairs, source_name, stored_name, to_pairs
from compress.kernels.dispatch import load_format
from compress.layerwise import model
from compress.layerwise.dense_view import DenseView
from compress.numerics.gguf_blocks import decode, encode, type_of
from compress.numerics.rounding import nearest
from compress.pipeline.plan import make_plan
from compress.spec.recipe import parse_one_liner
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from families import GGUF, build, build_gguf
from support import linear, logits, random_codes, run, shared, step_of, tiny_llama


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory."""
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.refs}


def same_tensors(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        if name.endswith(".tensor_scale"):
            # Its reciprocal is what is stored.
            torch.testing.assert_close(a[name], b[name], rtol=2**-23, atol=0)
            continue
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", shared([*GGUF]))
def test_pack_and_unpack_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Codes, scales and every dense tensor, of every architecture."""
    result = run(build_gguf(name, tmp_path), tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack(format=gguf)")
    canonical = step_of(result.out, "quantize.rtn")
    assert result.plan.steps[-1].payload_bytes == open_checkpoint(result.out).nbytes
    assert (result.out / GGUF_FILE).stat().st_size == result.plan.steps[-1].shards[0].nbytes
    assert not list(result.out.glob("*.safetensors"))
    run(result.out, tmp_path / "back", "unpack")
    same_tensors(tmp_path / "back", canonical)
    packed, meant = (model.build(open_checkpoint(place)) for place in (result.out, canonical))
    assert torch.equal(logits(packed), logits(meant))
    run(tmp_path / "back", tmp_path / "again", "pack(format=gguf)")
    assert (tmp_path / "again" / GGUF_FILE).read_bytes() == (result.out / GGUF_FILE).read_bytes()


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16g64",
        "w4a16",
        "w5a16g32",
        "w8a16g32",
        "w8a16",
        "mxfp4",
        "mxfp4-even",
        "nvfp4",
        "w4a16g64-min",
        "w5a16-min",
        "iq4_nl",
    ],
)
def test_groups_of_any_multiple_and_masks(tiny: Path, tmp_path: Path, scheme: str) -> None:
    skip = ", skip=['re:.*down_proj.*']" if scheme.startswith(("w4a16g64", "nvfp4")) else ""
    # Codes of which none need mean zero would not keep zeros.
    prune, masked = ("", "") if Scheme.parse(scheme).zeroless else ("prune.magnitude(sparsity=2:4) | ", "+masked(2:4)")
    result = run(tiny, tmp_path / "out", f"{prune}quantize.rtn(scheme={scheme}{skip}) | pack(format=gguf)")
    assert any(note.what == "stored" and scheme in note.reason for note in result.manifest.notes)
    dense_view = DenseView(open_checkpoint(result.out))
    assert {str(state) for _, state in dense_view.weights.values()} == {f"codes({scheme}){masked}"}
    run(result.out, tmp_path / "back", "unpack")
    same_tensors(tmp_path / "back", step_of(result.out, "quantize.rtn"))


def test_a_dense_model_is_packed_too(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", "pack(format=gguf)")
    run(tmp_path / "out", tmp_path / "back", "unpack")
    same_tensors(tmp_path / "back", tiny)


@pytest.mark.parametrize(("scheme", "kind", "nbytes"), [("w8a16", "Q8_0", 2), ("w4a16-min", "Q4_1", 4)])
def test_scales_that_are_repeated_are_told_in_bytes(scheme: str, kind: str, nbytes: int, tiny: Path) -> None:
    """14 matrices of 64 columns, and 2 of 96: a scale a row instead of two or three."""
    plan = planned(tiny, f"quantize.rtn(scheme={scheme}) | pack(format=gguf)")
    rows = sum(
        weight.rows * (weight.columns // 32 - 1)
        for weight in plan.weights
        if weight.kind == "linear" and weight.block is not None
    )
    said = {note.reason for note in plan.steps[-1].notes if note.what == "stored"}
    assert said == {
        "embedding in BF16", "head in BF16", "norm in F32",
        f"{scheme} as {kind}, scales repeated: {nbytes * rows:,} bytes more",
    }  # fmt: skip


def test_numbers_that_are_not_stored_exactly_are_counted(tiny: Path) -> None:
    for scheme, said in (
        ("nvfp4, skip=['re:.*down_proj.*']", "the divisor of a matrix as its reciprocal, within 2^-23 of it"),
        ("w4a16g32-min", "bf16 minima below 2^-14 rounded to fp16, by at most 2^-25"),
    ):
        notes = planned(tiny, f"quantize.rtn(scheme={scheme}) | pack(format=gguf)").steps[-1].notes
        assert {note.reason for note in notes if note.what == "scales"} == {said}


def test_a_minimum_that_fp16_has_only_in_part() -> None:
    """Far below a scale it is rounded, and beyond fp16 refused."""
    weight, q = linear((1, 32)), nearest(torch.rand(1, 32), Scheme.parse("w4a16g32-min"), torch.bfloat16).q
    fmt = load_format("gguf")()
    small = replace(q, minimum=torch.full_like(q.minimum, 1e-6))
    back = fmt.decode(weight, State(q.scheme), fmt.encode(weight, small))
    assert 0 < float((back.minimum.float() - 1e-6).abs()) <= 2**-25
    with pytest.raises(FormatError, match="scales that fp16 can hold"):
        fmt.encode(weight, replace(q, minimum=torch.full_like(q.minimum, 1e6)))


def planned(source: Path, recipe: str) -> Any:
    from compress.architecture.weight_map import resolve

    checkpoint = open_checkpoint(source)
    return make_plan(parse_one_liner(recipe), checkpoint, resolve(checkpoint))


@pytest.mark.parametrize(
    "text", ["w4a16g32", "w5a16g32", "w8a16g64", "w4a16", "mxfp4", "nvfp4", "w4a16g32-min", "w5a16g64-min", "w5a16-min", "iq4_nl"]
)
def test_the_package_gguf_dequantizes_the_same_values(text: str) -> None:
    quants, constants = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf.constants")
    weight, scheme = linear((5, 192)), Scheme.parse(text)
    plain = scheme.integer and not scheme.minimum
    q = random_codes(weight, scheme) if plain else nearest(torch.randn(weight.shape), scheme, torch.float16).q
    q = q if q.tensor_scale is None else replace(q, tensor_scale=torch.tensor(256.0))
    kind = type_of(scheme)
    blocks = encode(kind, q.codes, q.scale.half() if scheme.scales == "row" else q.scale, q.minimum)
    theirs = torch.from_numpy(quants.dequantize(blocks.numpy(), constants.GGMLQuantizationType[kind]))
    assert torch.equal(theirs if q.tensor_scale is None else theirs / q.tensor_scale, q.dequantize())
    codes, _, minimum = decode(kind, blocks)
    assert torch.equal(codes, q.codes)
    assert (minimum is None) == (q.minimum is None)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_the_package_gguf(model_type: str) -> None:
    """Its tables give the same name for each module, and ours lead back."""
    constants, mapping = pytest.importorskip("gguf.constants"), pytest.importorskip("gguf.tensor_mapping")
    architecture = ARCHITECTURES[model_type]
    number = next(key for key, name in constants.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = mapping.get_tensor_name_map(number, 2)
    for path in [f"model.layers.1.{path}" for path in architecture.modules] + ["model.embed_tokens", "model.norm", "lm_head"]:
        name = f"{path.replace('#', '3')}.weight"
        stored = stored_name(architecture, name)
        # Its names of experts have no number, because they are stacked.
        asked = path.replace(".#", "")
        known = table.get_name(asked, try_suffixes=(".weight",)) or table.get_name(f"{asked}.weight", try_suffixes=(".weight",))
        assert known in (None, stored.partition("[")[0].removesuffix(".weight"), stored.partition("[")[0]), (name, stored, known)
        assert source_name(architecture, stored) == name
    assert stored_name(architecture, "model.layers.1.self_attn.rotary_emb.inv_freq") == ""
    assert source_name(architecture, "blk.1.attn_rot_embd.weight") == ""


def test_rows_of_heads_become_neighbours() -> None:
    rows = torch.arange(8)[:, None]
    assert to_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(from_pairs(to_pairs(rows, 2), 2), rows)


def test_rows_of_heads_lie_as_written_by_hand(tiny: Path, tmp_path: Path) -> None:
    """4 heads of 16: row i of the first half of a head, then row i of the second."""
    run(tiny, tmp_path / "out", "pack(format=gguf)")
    stored, source = tensors(tmp_path / "out"), tensors(tiny)
    for name, heads in (("q", 4), ("k", 2)):
        rows = source[f"model.layers.1.self_attn.{name}_proj.weight"]
        order = [16 * head + half * 8 + i for head in range(heads) for i in range(8) for half in (0, 1)]
        assert torch.equal(stored[f"blk.1.attn_{name}.weight"], rows[order])
    assert torch.equal(stored["blk.1.attn_v.weight"], source["model.layers.1.self_attn.v_proj.weight"])


@pytest.mark.parametrize(
    ("scheme", "shape", "said"),
    [
        ("w4a16g32-asym", (64, 96), "floating minimum"), ("w3a16g32", (64, 96), "no type of it holds w3a16g32"),
        ("nf4g32", (64, 96), "no type of it holds nf4g32"), ("nvfp4", (64, 96), "blocks of 64"),
        ("w8a16g32-min", (64, 96), "no type of it holds w8a16g32-min"),
        ("fp8", (64, 96), "no type of it holds fp8"), ("w8a8", (64, 96), "activations in its own way"),
        ("w4a16g16", (64, 96), "blocks of 32"), ("w4a16g32", (64, 72), "blocks of 32"), ("w4a16g64", (64, 96), "do not divide"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(scheme: str, shape: tuple[int, int], said: str) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        load_format("gguf")().refuse(linear(shape), State(Scheme.parse(scheme)))
    assert caught.value.do


def test_nvfp4_of_what_llama_cpp_does_not_scale_is_refused() -> None:
    fmt, state = load_format("gguf")(), State(Scheme.parse("nvfp4"))
    for weight, said in (
        (linear((64, 64), kind="embedding"), "an embedding"),
        (linear((4, 64, 64), kind="expert"), "fused experts"),
    ):
        with pytest.raises(Refusal, match=f"does not multiply {said} by a number"):
            fmt.refuse(weight, state)


@pytest.mark.parametrize(("name", "said"), [("qwen2", "matrices of qwen2"), ("biased", "matrices of llama with a bias")])
def test_nvfp4_of_what_llama_cpp_runs_without_its_number_is_refused(name: str, said: str, tmp_path: Path) -> None:
    source = build_gguf(name, tmp_path)
    with pytest.raises(FormatError, match=f"does not multiply {said}"):
        run(source, tmp_path / "out", "quantize.rtn(scheme=nvfp4, skip=['re:.*down_proj.*']) | pack(format=gguf)")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {}, "gpt2 is not among the architectures"),
        ("gemma2", {}, "attention scaled by 256"),
        ("qwen3_moe", {}, "weights of experts scaled to one"),
        ("llama", {"hidden_act": "gelu"}, "computes llama with silu, not gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "the kind dynamic"),
        ("gemma3", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention", "sliding_attention"]}, "every block number 6"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = build(name, tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(FormatError, match=said):
        run(source, tmp_path / "out", "pack(format=gguf)")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_fp16_cannot_hold(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m")
    from safetensors.torch import load_file, save_file

    held = load_file(source / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"] *= 1e-6
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="scales that fp16 can hold"):
        run(source, tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack(format=gguf)")


def test_the_tokenizer_goes_with_it(demo_model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = shutil.copytree(demo_model, tmp_path / "m")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    run(source, tmp_path / "out", "quantize.rtn(scheme=w8a16g32) | pack(format=gguf)")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).fields.items()}
    content = json.loads((source / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.tokens"] == sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    assert fields["tokenizer.ggml.merges"] == [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["llama.embedding_length"] == 128


def test_a_tokenizer_that_does_not_fit(demo_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(demo_model, tmp_path / "m")
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<far>"})
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="tokens beyond the 1024 of the embedding"):
        run(source, tmp_path / "out", "pack(format=gguf)")
    content["model"]["type"] = "WordPiece"
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="a tokenizer of the type WordPiece"):
        run(source, tmp_path / "out", "pack(format=gguf)")


def test_without_a_tokenizer_and_with_an_unknown_one_it_says_so(tiny: Path, demo_model: Path, tmp_path: Path) -> None:
    found = {note.reason for note in planned(tiny, "pack(format=gguf)").steps[-1].notes if note.what == "tokenizer"}
    assert found == {"no tokenizer.json, so the file has no vocabulary and is run on token ids only"}
    source = shutil.copytree(demo_model, tmp_path / "m")
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    (found,) = {note.reason for note in planned(source, "pack(format=gguf)").steps[-1].notes if note.what == "tokenizer"}
    assert "`default` may split otherwise" in found
