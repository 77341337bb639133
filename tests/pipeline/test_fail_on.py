"""Gates: what is odd in a run stops it before anything is published, and what is no gate is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.errors import GateError, UsageError
from compress.pipeline.fail_on import Gate
from compress.pipeline.output_paths import steps_folder
from families import build
from support import do, ready_inputs, run, tree


@pytest.fixture(scope="module")
def starved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose router sends every token to the first experts."""
    folder: Any = build("mixtral", tmp_path_factory.mktemp("starved") / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "gate.weight" in name and "experts" not in name:
            tensors[name][2:] = 0
            tensors[name][:2] = 0
            tensors[name][:2] += torch.tensor([[1.0], [1.0]]).to(tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    return Path(folder)


@pytest.mark.parametrize("recipe", ["quantize.gptq(scheme=w4a16g32, min_tokens=1)", "prune.wanda(sparsity=0.5)"])
def test_experts_that_no_token_reaches_are_counted(recipe: str, starved: Path, tmp_path: Path) -> None:
    calibrate = f"calibrate(data='{ready_inputs(1, 3)}', samples=1)"
    result = do(starved, tmp_path / "out", f"{calibrate} | {recipe}")
    notes = [note for note in result.manifest.notes if note.what == "unrouted"]
    assert notes
    assert all("experts" in name for note in notes for name in note.names)
    with pytest.raises(GateError, match="--fail-on unrouted>0"):
        _gated(starved, tmp_path / "out", f"{calibrate} | {recipe}", "unrouted>0")


def _gated(source: Path, out: Path, recipe: str, *gates: str) -> Manifest:
    from compress.context import Context
    from compress.pipeline.run import Options, run_recipe
    from compress.spec.recipe import parse_one_liner

    context, options = Context(threads=2, dtype="float32"), Options(fail_on=gates)
    return run_recipe(parse_one_liner(recipe), open_checkpoint(source), out, context, options).manifest


def test_a_gate_stops_before_anything_is_published_and_nothing_is_lost(tiny: Path, tmp_path: Path) -> None:
    recipe = "prune.magnitude(sparsity=0.5) | quantize.rtn(scheme=w2a16g32) | pack"
    reference = run(tiny, tmp_path / "reference", recipe)
    with pytest.raises(GateError, match=r"quantize\.rtn.*--fail-on error>0\.4") as caught:
        _gated(tiny, tmp_path / "out", recipe, "error>0.4")
    assert caught.value.exit_status == 7
    assert "model.layers" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert [path.name.split("-")[1] for path in steps_folder(tmp_path / "out").glob("*-*") if path.suffix != ".tmp"] == [
        "prune.magnitude"
    ]
    assert _gated(tiny, tmp_path / "out", recipe).digests == reference.manifest.digests
    # What is there already passes the same gates.
    with pytest.raises(GateError):
        _gated(tiny, tmp_path / "out", recipe, "error>0.4")
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_skips_are_gated_before_any_work(tiny: Path, tmp_path: Path) -> None:
    from compress.context import Context
    from compress.pipeline.run import Options, run_recipe
    from compress.spec.recipe import parse_one_liner

    recipe = parse_one_liner("quantize.rtn(scheme=w4a16g64)")
    for gate, fails in (("skips>0", True), ("skips>14%", True), ("skips>15%", False), ("skips>2", False)):
        options = Options(allow_skips=["down_proj"], fail_on=[gate])
        if fails:
            with pytest.raises(GateError, match="2 of 14"):
                run_recipe(recipe, open_checkpoint(tiny), tmp_path / "out", Context(), options)
            assert list(tmp_path.iterdir()) == []
        else:
            run_recipe(recipe, open_checkpoint(tiny), tmp_path / gate, Context(), options)


@pytest.mark.parametrize("text", ["fallbacks>1%", "skips>0", "error>0.3", "zero-rows>12", "clamped>0.5%"])
def test_a_gate_prints_back(text: str) -> None:
    assert str(Gate.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("fallback>1", "did you mean 'fallbacks'"), ("skips", "a word and a limit"), ("skips>-1", "a word and a limit"),
     ("skips>nan", "a word and a limit"), ("error>3%", "as a number"), ("", "a word and a limit")],
)  # fmt: skip
def test_what_is_no_gate_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Gate.parse(text)
