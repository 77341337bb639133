"""prune.sparsegpt, refits, OWL and quantize.gptq with zeros as passes: what is written, counted and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build as commands
from compress.contract.discover import load_pass
from compress.layerwise.dense_view import DenseView
from compress.numerics.masks import holds, keep_best
from compress.pipeline.run import Result
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import State
from families import build, inputs_for
from support import CALIBRATE, kl, load, logits, ready_inputs, run, step_of

READY = f"calibrate(data='{ready_inputs()}', samples=6)"


def output_error(result: Result) -> float:
    """Of all weights together."""
    return sum(record.output_error or 0 for record in result.manifest.weights.values())


def test_it_is_ahead_of_wanda_and_a_refit_of_both(demo_model: Path, tmp_path: Path) -> None:
    """On trained weights, by KL to the source, as by the outputs that a refit cannot move away."""
    found: dict[str, tuple[float, float]] = {}
    for name in ("wanda", "sparsegpt"):
        for options in ("", ", refit=true"):
            out = tmp_path / f"{name}{len(options)}"
            result = run(demo_model, out, f"{CALIBRATE} | prune.{name}(sparsity=2:4{options})")
            found[name + options] = kl(demo_model, out), output_error(result)
    assert found["sparsegpt"][0] < 0.8 * found["wanda"][0]
    for name in ("wanda", "sparsegpt"):
        assert found[f"{name}, refit=true"] < found[name]


@pytest.mark.parametrize("options", ["2:4", "4:8, order=activation", "0.5, scope=row", "0.7, block=32, refit=true"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "t5"])
def test_patterns_and_zeros_of_many_families(name: str, options: str, tmp_path: Path) -> None:
    """Groups run along the inputs, of turned weights too; zeros are +0.0; nothing else changes."""
    source, sparsity = build(name, tmp_path), Sparsity.parse(options.split(",")[0])
    data = inputs_for(name, tmp_path)
    run(source, tmp_path / "out", f"calibrate(data='{data}', samples=5) | prune.sparsegpt(sparsity={options})")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.manifest is not None
    for weight in resolve(after).weights:
        old, new = before.read(weight.name), after.read(weight.name)
        if weight.name not in after.manifest.weights:
            assert torch.equal(old, new)
            continue
        value = new.transpose(-1, -2) if weight.transposed else new
        assert holds(value != 0, sparsity), weight.name
        assert not torch.signbit(new[new == 0]).any()
        assert torch.isfinite(new).all()
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_starved_experts_are_pruned_by_magnitude_and_counted(tmp_path: Path) -> None:
    source = build("mixtral", tmp_path)
    calibrate = f"calibrate(data='{ready_inputs(1)}', samples=1)"
    for recipe, words in {
        "prune.sparsegpt(sparsity=2:4, min_tokens=12)": "fewer than 12 calibration tokens: pruned by magnitude",
        "prune.wanda(sparsity=2:4, refit=true)": "fewer than 32 calibration tokens: not refitted",
    }.items():
        out = tmp_path / recipe[6:9]
        notes = run(source, out, f"{calibrate} | {recipe}").manifest.notes
        (note,) = [note for note in notes if note.what == "fallback"]
        assert note.reason == words
        assert all("experts" in name for name in note.names) or "wanda" in recipe
    starved = next(note for note in notes if note.what == "fallback").names
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "spa")
    (note,) = [note for note in run(source, tmp_path / "spa", f"{calibrate} | {next(iter(('prune.sparsegpt(sparsity=2:4, min_tokens=12)',)))}").manifest.notes if note.what == "fallback"]
    old = before.read(note.names[0])
    assert torch.equal(after.read(note.names[0]), old * keep_best(old.float().abs(), Sparsity.parse("2:4")))
    assert starved
