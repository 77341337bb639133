"""Checkpoints: every way in which a directory can be wrong is refused before anything is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, InputError
from support import run, tiny_llama, tree

RECIPE = "quantize.rtn(scheme=w4a16g32) | pack"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "sharded", "60KB")


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key) if value is None else config.update({key: value})
    (model / "config.json").write_text(json.dumps(config))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def edit_index(model: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def set_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return change


Q = "model.layers.0.self_attn.q_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "truncated"),
    "only pickle": (only_pickle, "pickle"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no safetensors"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), "JSON object"),
    "config is cut": (lambda m: (m / "config.json").write_text('{"model_type": "lla'), "JSON"),
    "a list for a model type": (lambda m: edit_config(m, model_type=["llama"]), "model_type"),
    "architectures of a strange kind": (lambda m: edit_config(m, architectures={"a": 1}), "architectures"),
    "architectures as one text": (lambda m: edit_config(m, architectures="LlamaForCausalLM", model_type="gpt2"), "architectures"),
    "no blocks": (lambda m: edit_config(m, num_hidden_layers=0), "num_hidden_layers"),
    "a million blocks": (lambda m: edit_config(m, num_hidden_layers=1_000_000), "num_hidden_layers"),
    "quantized in an unknown way": (lambda m: edit_config(m, quantization_config="4bit"), "an object in quantization_config"),
    "unknown model type": (lambda m: edit_config(m, model_type="lama"), "did you mean"),
    "remote code": (lambda m: edit_config(m, model_type="mystery", auto_map={"AutoModel": "evil.Model"}), "is not run"),
    "class of another model": (lambda m: edit_config(m, architectures=["GPT2LMHeadModel"]), "architectures"),
    "config of other sizes": (lambda m: edit_config(m, hidden_size=128), "by config.json"),
    "more layers than tensors": (lambda m: edit_config(m, num_hidden_layers=3), "none"),
    "config of another dtype": (lambda m: edit_config(m, dtype="float32"), "--allow-dtype-mismatch"),
    "quantized by another tool": (lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), "gptq"),
    "NaN": (lambda m: edit_tensors(m, set_value(Q, float("nan"))), "--allow-nonfinite"),
    "Inf in a norm": (lambda m: edit_tensors(m, set_value("model.norm.weight", float("inf"))), "model.norm.weight"),
    "integers for a weight": (lambda m: edit_tensors(m, lambda t: t.update({Q: t[Q].to(torch.int8)})), "I8"),
    "a transposed weight": (
        lambda m: edit_tensors(m, lambda t: t.update({Q.replace("q_proj", "k_proj"): t[Q.replace("q_proj", "k_proj")].T.contiguous()})),
        "k_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_published(case: str, model: Path, tmp_path: Path) -> None:
    spoil, said = BAD[case]
    spoil(model)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        run(model, tmp_path / "out", RECIPE)
    assert said in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before


BAD_INDEX: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "escape": (lambda w: w.update({Q: "../secret.safetensors"}), "out of it"),
    "absolute": (lambda w: w.update({Q: "/etc/passwd"}), "out of it"),
    "missing shard": (lambda w: w.update({Q: "model-00099-of-00099.safetensors"}), "missing"),
    "wrong shard": (lambda w: w.update({Q: w["lm_head.weight"]}), "it is in"),
    "no such tensor": (lambda w: w.update({"ghost": w[Q]}), "no shard has it"),
    "a tensor left out": (lambda w: w.pop(Q), "does not name"),
    "not safetensors": (lambda w: w.update({Q: "config.json"}), "safetensors"),
    "a number": (lambda w: w.update({Q: 3}), "same directory"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index(case: str, sharded: Path) -> None:
    change, said = BAD_INDEX[case]
    edit_index(sharded, change)
    with pytest.raises(InputError) as caught:
        open_checkpoint(sharded)
    assert said in str(caught.value)


def test_a_link_that_leads_nowhere(sharded: Path) -> None:
    file = next(sharded.glob("*.safetensors"))
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(InputError, match="missing"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(files[1])
    tensors.update(dict(list(load_file(files[0]).items())[:1]))
    save_file(tensors, files[1])
    with pytest.raises(InputError, match="each tensor once"):
        open_checkpoint(sharded)


def test_allowed_nonfinite_is_counted(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, set_value("model.norm.weight", float("inf")))
    result = run(model, tmp_path / "out", RECIPE, allow_nonfinite=True)
    assert [(n.what, n.names) for n in result.manifest.notes if n.what == "nonfinite"] == [("nonfinite", ("model.norm.weight",))]


def test_nan_in_a_weight_that_is_rounded_is_never_allowed(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, set_value(Q, float("nan")))
    with pytest.raises(InputError, match="put it under skip"):
        run(model, tmp_path / "out", RECIPE, allow_nonfinite=True)
    run(model, tmp_path / "out", f"quantize.rtn(scheme=w4a16g32, skip=[{Q}]) | pack", allow_nonfinite=True)


def test_how_attention_is_run_says_nothing_of_tensors(model: Path, tmp_path: Path) -> None:
    edit_config(model, _attn_implementation="flash_attention_2")
    run(model, tmp_path / "out", RECIPE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_attn_implementation"] == "flash_attention_2"


def test_the_only_copy_of_a_tied_pair_is_the_embedding(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    edit_tensors(model, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    kinds = {weight.name: weight.kind for weight in resolve(open_checkpoint(model)).weights}
    assert kinds["lm_head.weight"] == "embedding"
    with pytest.raises(CompressError, match="tied"):
        run(model, tmp_path / "out", "quantize.rtn(scheme=w4a16g32, targets=[linear, head]) | pack")


def test_sharding_changes_nothing(tiny: Path, sharded: Path, tmp_path: Path) -> None:
    a, b = run(tiny, tmp_path / "a", RECIPE), run(sharded, tmp_path / "b", RECIPE)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert a.manifest.digests == b.manifest.digests
    small = run(tiny, tmp_path / "c", RECIPE, shard_bytes=20_000)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    assert small.manifest.digests == a.manifest.digests


def test_the_source_is_not_touched(model: Path, tmp_path: Path) -> None:
    (model / "notes.txt").write_text("carried along")
    before = tree(model)
    run(model, tmp_path / "out", RECIPE)
    assert tree(model) == before
    assert (tmp_path / "out" / "notes.txt").read_text() == "carried along"


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    edit_tensors(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    result = run(model, tmp_path / "out", RECIPE)
    assert "lm_head.weight" not in result.manifest.digests
    assert [n.names for n in result.manifest.notes if n.what == "tied"] == [("lm_head.weight",)]
    edit_tensors(model, lambda t: t["lm_head.weight"].add_(1))
    result = run(model, tmp_path / "out2", RECIPE)
    assert "lm_head.weight" in result.manifest.digests, "what differs is not tied, whatever config.json says"


def test_an_edited_manifest_is_refused(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "codes", "quantize.rtn(scheme=w4a16g32)")
    path = tmp_path / "codes" / "manifest.json"
    path.write_text(path.read_text().replace("w4a16g32", "w4a16g64"))
    with pytest.raises(InputError, match="edited"):
        open_checkpoint(tmp_path / "codes")


def test_changed_bytes_of_a_canonical_checkpoint_are_found(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "codes", "quantize.rtn(scheme=w4a16g32)")
    file = tmp_path / "codes" / "canonical.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CompressError, match="other bytes"):
        run(tmp_path / "codes", tmp_path / "out", "pack")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_float_dtype_goes_through(dtype: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", dtype=dtype)
    result = run(model, tmp_path / "out", RECIPE)
    scale = open_checkpoint(tmp_path / "out").refs[f"{Q}_scale"].dtype
    assert scale == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert result.manifest.coverage["transformed"] == 14
