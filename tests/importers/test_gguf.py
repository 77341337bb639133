"""GGUF files of other tools: written here by the package gguf, read as checkpoints, with its own dequantization as the oracle."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint.gguf_header import Entry, Info, write_gguf
from compress.checkpoint.reader import GGUF_FILE, open_checkpoint
from compress.checkpoint.source import open_source
from compress.errors import InputError
from compress.layerwise import model
from compress.layerwise.dense_view import DenseView
from compress.spec.gguf_types import TYPES
from families import build_gguf
from support import logits, run, step_of, tiny_llama

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def packed(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of ours, whose file is then another tool's; do not write into it."""
    out = tmp_path_factory.mktemp("packed") / "out"
    run(demo_model, out, "quantize.rtn(scheme=w4a16g32) | pack(format=gguf)")
    return out


@pytest.fixture
def alone(packed: Path, tmp_path: Path) -> Path:
    """The file by itself, in a directory."""
    (tmp_path / "theirs").mkdir()
    return Path(shutil.copyfile(packed / GGUF_FILE, tmp_path / "theirs" / "any name.gguf"))


def rewritten(
    file: Path, out: Path, kinds: dict[str, str], keys: dict[str, Any] | None = None, numbers: dict[str, int] | None = None
) -> Path:  # fmt: skip
    """The same model with the tensors whose names end so quantized anew to other types, by the package gguf; `keys` None to leave out.

    `numbers` says how many a row of numbers then has.
    """
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "llama")
    given = keys or {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in given:
            continue
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for name, value in given.items():
        if value is not None:
            writer.add_key_value(name, *value)
    for tensor in reader.tensors:
        kind = next((kind for ending, kind in kinds.items() if tensor.name.endswith(ending)), None)
        if kind is None:
            data = tensor.data[: (numbers or {}).get(tensor.name, len(tensor.data))]
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
            continue
        number = gguf.GGMLQuantizationType[kind]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, gguf.quantize(values, number), raw_dtype=number)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return out


def test_a_file_a_directory_and_its_folder_in_the_cache_are_one_checkpoint(alone: Path, packed: Path, cache: Path) -> None:
    one = open_source(str(alone))
    assert one.name == "any name"
    assert one.path.parent == cache / "gguf"
    for place in (alone.parent, one.path):
        other = open_checkpoint(place)
        assert (other.path, other.refs, other.config) == (one.path, one.refs, one.config)
    assert set(one.side_files) == {"tokenizer.json", "tokenizer_config.json"}
    said = json.loads((packed / "config.json").read_text())
    assert {key: said[key] for key in one.config if key in said and key not in ("dtype", "pad_token_id")} == {
        key: value for key, value in one.config.items() if key in said and key not in ("dtype", "pad_token_id")
    }
    assert one.config["dtype"] == "float16"
    ours, meant = (logits(model.build(checkpoint, rounded=False)) for checkpoint in (one, open_checkpoint(packed)))
    assert torch.equal(ours, meant)


def test_codes_are_kept_and_go_on_to_other_readers(alone: Path, packed: Path, tmp_path: Path) -> None:
    run(open_source(str(alone)), tmp_path / "out", "unpack | pack")
    ours, canonical = DenseView(open_checkpoint(tmp_path / "out")), step_of(packed, "quantize.rtn")
    meant = DenseView(open_checkpoint(canonical))
    assert ours.weights.keys() == meant.weights.keys()
    for name in meant.weights:
        q, wanted = ours.qtensor(name), meant.qtensor(name)
        assert q is not None
        assert wanted is not None
        assert torch.equal(q.codes, wanted.codes)
        assert torch.equal(q.scale.float(), wanted.scale.float())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


KINDS = {
    "ffn_down.weight": "Q4_1",
    "ffn_up.weight": "Q5_0",
    "attn_q.weight": "Q5_1",
    "attn_k.weight": "Q8_0",
    "token_embd.weight": "F16",
}


def test_types_without_a_scheme_are_dense_and_counted(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m", hidden_size=256, intermediate_size=256)
    run(source, tmp_path / "out", "quantize.rtn(scheme=w8a16g32) | pack(format=gguf)")
    file = rewritten(
        tmp_path / "out" / GGUF_FILE, tmp_path / "ternary.gguf", {"ffn_up.weight": "TQ1_0", "attn_v.weight": "TQ2_0"}
    )
    dense_view = DenseView(open_checkpoint(file))
    assert {note.reason: note.count for note in dense_view.foreign.notes} == {  # type: ignore[union-attr]
        f"no scheme here has the values of {kind}, so it is dense": 2 for kind in ("TQ1_0", "TQ2_0")
    }
    same_values(dense_view, file)


def same_values(dense_view: DenseView, file: Path) -> None:
    """Every weight is what the package gguf makes of its tensor, with rows of heads of 16 taken apart."""
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, packed in dense_view.foreign.weights.items():  # type: ignore[union-attr]
        tensor = reader[packed.parts[0]]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).copy())
        if (kind := packed.parts[0].split(".")[-2]) in ("attn_q", "attn_k"):
            config = dense_view.checkpoint.config
            heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(dense_view.dense(name).float(), values.to(dense_view.dense(name).dtype).float()), name


def test_codes_of_other_tools_are_kept(alone: Path, tmp_path: Path) -> None:
    file = rewritten(alone, tmp_path / "mixed.gguf", KINDS)
    dense_view = DenseView(open_checkpoint(file))
    assert not dense_view.foreign.notes  # type: ignore[union-attr]
    held = Counter(str(packed.scheme) for packed in dense_view.foreign.weights.values() if packed.scheme)  # type: ignore[union-attr]
    assert {"w4a16g32-min", "w5a16g32", "w5a16g32-min", "w8a16g32"} <= held.keys()
    same_values(dense_view, file)
    run(open_checkpoint(file), tmp_path / "out", "unpack(to=dense) | quantize.rtn(scheme=w8a16g32) | pack")
    run(open_checkpoint(file), tmp_path / "again", "unpack | pack(format=gguf)")
    ours, theirs = ({t.name: t for t in gguf.GGUFReader(place).tensors} for place in (tmp_path / "again" / GGUF_FILE, file))
    for name, tensor in ours.items():
        if tensor.tensor_type.name.startswith(("Q4", "Q5", "Q8")):
            assert np.array_equal(tensor.data, theirs[name].data), name


def test_nvfp4_of_a_stack_and_its_numbers(tmp_path: Path) -> None:
    """Experts of a block share a row of numbers, which must be as many as they are."""
    source = build_gguf("mixtral", tmp_path)
    skip = "skip=['re:.*(down_proj|w2).*']"
    run(source, tmp_path / "out", f"quantize.rtn(scheme=nvfp4, targets=[linear, experts], {skip}) | pack(format=gguf)")
    ours = DenseView(open_checkpoint(step_of(tmp_path / "out", "quantize.rtn")))
    file = Path(shutil.move(tmp_path / "out" / GGUF_FILE, tmp_path / "a.gguf"))
    theirs = DenseView(open_checkpoint(file))
    held = {name for name, packed in theirs.foreign.weights.items() if packed.scheme is not None}  # type: ignore[union-attr]
    assert held == {name for name, (_, state) in ours.weights.items() if state.scheme is not None}
    for name in held:
        a, b = ours.qtensor(name), theirs.qtensor(name)
        assert a is not None
        assert b is not None
        assert torch.equal(a.codes, b.codes)
        torch.testing.assert_close(a.dequantize(), b.dequantize(), rtol=2**-22, atol=0)
    wrong = rewritten(file, tmp_path / "wrong.gguf", {}, numbers={"blk.0.ffn_up_exps.scale": 1})
    with pytest.raises(InputError, match=r"ffn_up_exps\.scale\[1\]"):
        DenseView(open_checkpoint(wrong))


def test_the_tokenizer_is_the_same(alone: Path, packed: Path) -> None:
    from tokenizers import Tokenizer

    text = "Once upon a time, 12 little birds...\n  it's  naïve 東京 </s> end"
    ours, theirs = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (packed, open_checkpoint(alone).path))
    assert ours.encode(text).ids == theirs.encode(text).ids
    assert theirs.decode(theirs.encode(text).ids) == ours.decode(ours.encode(text).ids)


def test_a_tokenizer_of_sentencepiece(demo_model: Path, tmp_path: Path) -> None:
    """Merges are recovered from scores; the model is one of BPE with bytes to fall back on."""
    from tokenizers import Tokenizer

    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcd", "ab", "\u2581ab", "cd", "abcd"]
    merges = [["a", "b"], ["c", "d"], ["\u2581", "ab"], ["ab", "cd"]]
    added = [
        {
            "id": i,
            "content": vocab[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in range(3)
    ]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None, "decoder": None,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges},
    }  # fmt: skip
    source = shutil.copytree(demo_model, tmp_path / "m")
    (source / "tokenizer.json").write_text(json.dumps(content))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    run(source, tmp_path / "out", "pack(format=gguf)")
    (tmp_path / "alone").mkdir()
    file = Path(shutil.move(tmp_path / "out" / GGUF_FILE, tmp_path / "alone" / "a.gguf"))
    back = Tokenizer.from_file(str(open_checkpoint(file).path / "tokenizer.json"))
    ours = Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in ("ab abcd cd", "  ab", "é\n", "abab dcba", ""):
        assert back.encode(text).ids == ours.encode(text).ids, text


def test_a_safetensors_checkpoint_with_a_gguf_beside_it_is_the_former(tiny: Path, packed: Path, tmp_path: Path) -> None:
    both = shutil.copytree(tiny, tmp_path / "both")
    shutil.copyfile(packed / GGUF_FILE, both / "a.gguf")
    checkpoint = open_checkpoint(both)
    assert not any(ref.kind for ref in checkpoint.refs.values())
    assert "a.gguf" in checkpoint.left_behind


def test_what_cannot_be_opened_says_why(alone: Path, tmp_path: Path) -> None:
    shutil.copyfile(alone, alone.with_name("second.gguf"))
    with pytest.raises(InputError, match="one GGUF file"):
        open_checkpoint(alone.parent)
    (tmp_path / "none").mkdir()
    for keys, said in (
        ({"llama.block_count": None}, "none for num_hidden_layers"),
        ({"llama.embedding_length": ("x", gguf.GGUFValueType.STRING)}, "one number for llama.embedding_length"),
        ({"llama.embedding_length": (64, gguf.GGUFValueType.UINT32)}, r"shape \[1024, 64\]"),
        ({"tokenizer.ggml.merges": (3, gguf.GGUFValueType.UINT32)}, "tokenizer.ggml.merges"),
        ({"llama.rope.scaling.type": ("longrope", gguf.GGUFValueType.STRING)}, "'longrope'"),
    ):
        file = rewritten(alone, tmp_path / "none" / "a.gguf", {}, keys)
        with pytest.raises(InputError, match=said):
            DenseView(open_checkpoint(file)).resolve(
                __import__("compress.architecture.weight_map", fromlist=["meta_model"]).meta_model(open_checkpoint(file))
            )
        file.unlink()
    header, _, size = write_gguf([Entry("general.architecture", "str", "bert")], [Info("a.weight", TYPES["F32"], (8,))])
    (tmp_path / "none" / "b.gguf").write_bytes(header + bytes(size - len(header)))
    with pytest.raises(InputError, match="an architecture among llama"):
        open_checkpoint(tmp_path / "none" / "b.gguf")
    file = rewritten(alone, tmp_path / "none" / "c.gguf", {})
    data = file.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight")
    file.write_bytes(data)
    with pytest.raises(InputError, match="no place for"):
        DenseView(open_checkpoint(file))
