"""peft: what the installed PEFT loads from the artifact is what we mean by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint.reader import ADAPTER, ADAPTER_CONFIG, ADAPTER_TENSORS, open_checkpoint
from compress.checkpoint.source import open_source
from compress.context import Context
from compress.errors import CompressError, FormatError
from compress.evaluate.verify import read_with, verify_bytes
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.numerics import qtensor
from families import build as build_family
from support import load, logits, run, shared, step_of

peft = pytest.importorskip("peft")
Source = Callable[[str], Path]
RECIPES = {
    "loftq": "quantize.loftq(scheme=nf4g16, rank=6)",
    "ranks": "quantize.loftq(scheme=w2a16g16-asym, rank=3, ranks=['attention=7', 're:.*(down|c)_proj=5'], outliers=0.01)",
    "lorc": "quantize.rtn(scheme=w3a16g16) | quantize.lorc(rank=4)",
    "some": "quantize.rtn(scheme=w8a16, targets=mlp) | quantize.loftq(scheme=nf2g16, targets=attention)",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build_family(name, folder)


def theirs(artifact: Path) -> Any:
    """PEFT's own model of an artifact."""
    return peft.PeftModel.from_pretrained(load(artifact, dtype=torch.float32), artifact, subfolder=ADAPTER)


@pytest.mark.parametrize(("name", "recipe"), shared(["llama", "tied", "gpt2", "qwen3"], [*RECIPES]))
def test_peft_computes_what_we_mean(name: str, recipe: str, source: Source, tmp_path: Path) -> None:
    result = run(source(name), tmp_path / "out", f"{RECIPES[recipe]} | pack(format=peft)")
    model = theirs(tmp_path / "out")
    ours = build(open_checkpoint(tmp_path / "out"), rounded=False)
    torch.testing.assert_close(logits(model), logits(ours), rtol=0, atol=1e-5)
    # Layer by layer: W - W' in PEFT is what the step before has reported.
    last = "quantize.lorc" if recipe == "lorc" else "quantize.loftq"
    dense_view = DenseView(open_checkpoint(step_of(tmp_path / "out", last)))
    dense = open_checkpoint(source(name))
    merged = model.merge_and_unload()
    factored = 0
    for key, (weight, state) in dense_view.weights.items():
        q = dense_view.qtensor(key)
        assert q is not None
        module = merged.get_submodule(next(w.module for w in result.plan.weights if w.name == key))
        # The base is rounded to bf16, factors are not.
        difference = (module.weight - qtensor.as_matrix(weight, q.dequantize())).abs().max()
        assert float(difference) <= 2**-8 * float(q.base().abs().max())
        w = dense.read(key).float()
        error = result.manifest.weights[key].error
        assert float((module.weight - w).norm() / w.norm()) == pytest.approx(error, rel=0.02, abs=5e-4)
        factored += state.lowrank is not None
    names = load_file(tmp_path / "out" / ADAPTER_TENSORS)
    assert len(names) == 2 * factored


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_are_exact_and_nothing_is_left_unread(recipe: str, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source("llama"), out, f"{RECIPES[recipe]} | pack(format=peft)", shard_bytes=30_000)
    files = {
        file
        for file in out.rglob("*")
        if file.is_file() and file.name not in ("manifest.json", "generation_config.json", "README.md")
    }
    assert sum(file.stat().st_size for file in files) == result.plan.steps[-1].disk_bytes
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {weight.name for weight in result.plan.weights}
    model = theirs(out)
    assert set(peft.get_peft_model_state_dict(model)) == set(load_file(out / ADAPTER_TENSORS))
    config = json.loads((out / ADAPTER_CONFIG).read_text())
    written = peft.LoraConfig.from_pretrained(out, subfolder=ADAPTER).to_dict()
    assert {key: written[key] for key in config} == {**config, "target_modules": set(config["target_modules"])}
    for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        assert layer.scaling["default"] == 1.0
    assert verify_bytes(open_checkpoint(out), Context()).decoded


@pytest.mark.usefixtures("warm")
def test_it_is_read_by_its_reader_and_a_damaged_one_is_told(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source("llama"), out, f"{RECIPES['ranks']} | pack(format=peft)")
    ids = torch.randint(3, 128, (2, 16))
    reading = read_with("peft", out, ids, lambda line: None)
    assert reading.equal
    assert reading.difference < 1e-5 * reading.largest
    # By the adapter's own folder and the base above it, too.
    assert read_with("peft", out / ADAPTER, ids, lambda line: None, base=out).equal
    # Our reading follows a config that multiplies by something else, but the manifest has its digest.
    config = out / ADAPTER_CONFIG
    config.write_text(config.read_text().replace('"lora_alpha": 7', '"lora_alpha": 14'))
    with pytest.raises(CompressError, match="manifest"):
        verify_bytes(open_checkpoint(out), Context())


def test_the_base_alone_is_what_transformers_reads(source: Source, tmp_path: Path) -> None:
    run(source("llama"), tmp_path / "out", f"{RECIPES['loftq']} | pack(format=peft)")
    step = DenseView(open_checkpoint(step_of(tmp_path / "out", "quantize.loftq")))
    base = load_file(tmp_path / "out" / "model.safetensors")
    for name, (weight, _) in step.weights.items():
        q = step.qtensor(name)
        assert q is not None
        assert torch.equal(base[name], qtensor.as_matrix(weight, q.base()).bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_recipe_goes_on_from_it_through_unpack_alone(source: Source, tmp_path: Path) -> None:
    run(source("llama"), tmp_path / "out", f"{RECIPES['loftq']} | pack(format=peft)")
    with pytest.raises(CompressError, match="begin with unpack"):
        run(tmp_path / "out", tmp_path / "no", "quantize.rtn(scheme=w4a16g32)")
    result = run(tmp_path / "out", tmp_path / "dense", "unpack")
    assert any(note.what == "foreign" for note in result.manifest.notes)
    torch.testing.assert_close(
        logits(load(tmp_path / "dense", dtype=torch.float32)), logits(build(open_checkpoint(tmp_path / "out"))), rtol=0, atol=1e-6
    )


def test_another_tools_adapter_is_read_with_its_own_scaling(source: Source, tmp_path: Path) -> None:
    """As LoftQ's own artifacts lie: a dense base, and PEFT's folder beside it."""
    shutil.copytree(source("llama"), tmp_path / "other")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 7},
        init_lora_weights=False, use_rslora=True,
    )  # fmt: skip
    model = peft.get_peft_model(load(source("llama"), dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "other" / ADAPTER)
    ours = build(open_source(str(tmp_path / "other")), rounded=False)
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "recipe", "said"),
    [
        ("llama", "quantize.rtn(scheme=w4a16g32)", "no adapter"),
        ("llama", "quantize.loftq(scheme=w8a8)", "would not round activations"),
        ("llama", "quantize.loftq(scheme=w8a16, targets=embeddings)", "factors of an embedding"),
        ("mixtral", "quantize.loftq(scheme=w8a16)", "no module of this tensor alone"),
        ("gpt_oss", "quantize.loftq(scheme=w8a16)", "no module of this tensor alone"),
    ],
)
def test_refusals(name: str, recipe: str, said: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        run(source(name), tmp_path / "out", f"{recipe} | pack(format=peft)")
