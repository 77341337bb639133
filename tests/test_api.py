"""The Python API: what `dir` shows, a recipe and a model in any form, a model of transformers saved and removed again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.errors import InputError, RecipeError, UsageError
from support import TEXT, tree

RECIPE = "quantize.rtn(scheme=w4a16g32) | pack(format=native)"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def left(folder: Path) -> list[str]:
    """What lies in a folder besides outputs and their steps."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_dir_shows_public_names_and_no_submodules() -> None:
    """In a fresh process, after everything has been imported that a run needs."""
    code = """
import compress, compress.pipeline.run, compress.cli.app
assert {"load", "run", "plan_of", "Context", "open_source", "Recipe"} <= set(dir(compress)), dir(compress)
assert dir(compress) == sorted([*compress.__all__, "__version__"]), dir(compress)
assert not {"pipeline", "cli", "recipe", "errors"} & set(dir(compress))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_three_lines(tiny: Path, tmp_path: Path) -> None:
    """As the package's own docstring has it."""
    assert 'compress.run("quantize.rtn(scheme=w4a16g64) | pack(format=native)", "MODEL", "OUT")' in (compress.__doc__ or "")
    result = compress.run(RECIPE, str(tiny), str(tmp_path / "out"))
    assert result.manifest.coverage["transformed"] == 14
    assert compress.load(tmp_path / "out")(torch.arange(5)[None]).logits.shape == (1, 5, 128)


def test_a_recipe_and_a_model_in_any_form(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("version: 1\nseed: 3\npasses:\n- quantize.rtn: {scheme: w4a16g32}\n- pack: {format: native}\n")
    recipes = [RECIPE, compress.parse_one_liner(RECIPE), str(file), file]
    sources = [tiny, str(tiny), compress.open_checkpoint(tiny), compress.open_source(tiny)]
    seeds = [0, 0, 3, 3]
    found = [
        compress.run(recipe, source, tmp_path / f"out{number}").manifest
        for number, (recipe, source) in enumerate(zip(recipes, sources, strict=True))
    ]
    assert [manifest.seed for manifest in found] == seeds
    assert found[0].fingerprint == found[1].fingerprint
    assert found[2].fingerprint == found[3].fingerprint
    # As it was called before.
    ctx, recipe = compress.Context(threads=1), compress.parse_one_liner(RECIPE)
    assert compress.run(recipe, compress.open_checkpoint(tiny), tmp_path / "old", ctx, compress.Options()).fresh
    plan = compress.plan_of(RECIPE, tiny)
    assert plan.steps[-1].disk_bytes == compress.run(RECIPE, tiny, tmp_path / "out0").plan.steps[-1].disk_bytes


def test_a_model_is_saved_and_the_copy_removed(model: Any, tiny: Path, tmp_path: Path) -> None:
    result = compress.run(RECIPE, model, tmp_path / "deep" / "out")
    assert result.manifest.source.name == tiny.name
    assert left(tmp_path / "deep") == []
    compress.run(RECIPE, tiny, tmp_path / "same")
    assert tree(tmp_path / "deep" / "out")["model.safetensors"] == tree(tmp_path / "same")["model.safetensors"]
    assert not compress.run(RECIPE, model, tmp_path / "deep" / "out").fresh
    with pytest.raises(RecipeError):
        compress.run("quantize.rtn(scheme=w4a16g32, clip=no) | pack", model, tmp_path / "deep" / "no")
    with pytest.raises(compress.CompressError):
        compress.run("quantize.rtn(scheme=w4a16g128)", model, tmp_path / "deep" / "no")
    assert left(tmp_path / "deep") == []


def test_its_tokenizer_goes_along(demo_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    calibrated = f"calibrate(data='{TEXT / 'calibration.jsonl'}', samples=4, length=64) | prune.wanda(sparsity=0.5)"
    # From where the model was loaded, or the one that is given.
    compress.run(calibrated, model, tmp_path / "found")
    model.config.name_or_path = ""
    model.name_or_path = ""
    with pytest.raises(compress.CompressError, match="tokenizer"):
        compress.run(calibrated, model, tmp_path / "none")
    result = compress.run(calibrated, model, tmp_path / "given", tokenizer=AutoTokenizer.from_pretrained(demo_model))
    assert result.manifest.source.name == "LlamaForCausalLM"
    assert (tmp_path / "given" / "tokenizer.json").is_file()
    assert left(tmp_path) == []


def test_what_cannot_be_right_is_refused_in_words(model: Any, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(InputError, match=r"21 of them on the meta device, such as model\.embed_tokens"):
        compress.run(RECIPE, empty, out)
    compress.run(RECIPE, tiny, tmp_path / "packed")
    with pytest.raises(InputError, match="a quantized model"):
        compress.run(RECIPE, compress.load(tmp_path / "packed"), out)
    with pytest.raises(UsageError, match=r"or a model of transformers\n  got:      Linear"):
        compress.run(RECIPE, torch.nn.Linear(2, 2), out)
    with pytest.raises(UsageError, match="save_pretrained it"):
        compress.plan_of(RECIPE, model)
    for text, said in [("nowhere", "such as 'quantize.rtn"), ("nowhere.yaml", "a recipe file"), ("pack(", r"recipe:1:6")]:
        with pytest.raises(RecipeError, match=said):
            compress.run(text, model, out)
    assert [path.name for path in tmp_path.iterdir() if path.name != "packed.steps"] == ["packed"]


def test_adapters_are_merged_first(tiny: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="merge_and_unload"):
        compress.run(RECIPE, adapted, tmp_path / "out")
    assert compress.run(RECIPE, adapted.merge_and_unload(), tmp_path / "out").fresh
