"""Nothing silent: what is odd in a weight is counted with its name, and a gate stops a run that has too much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build as app
from compress.errors import GateError, InputError, UsageError
from compress.executors.anomalies import watch
from compress.numerics.grid import round_to_nearest
from compress.numerics.qtensor import QTensor
from compress.pipeline.fail_on import Gate
from compress.pipeline.output_paths import steps_folder
from compress.spec.scheme import Scheme
from families import build
from support import do, linear, ready_inputs, run, tree

CALIBRATE = "calibrate(data='{}', samples=6)"


def codes(w: torch.Tensor, scheme: str = "w4a16g32", dtype: torch.dtype = torch.bfloat16) -> QTensor:
    made = round_to_nearest(w, Scheme.parse(scheme), dtype)
    return QTensor(Scheme.parse(scheme), made.codes, made.scale, made.zero)


def words(found: list[tuple[str, str]]) -> list[str]:
    return [what for what, _ in found]


def test_what_is_odd_is_told() -> None:
    w = torch.randn(64, 96)
    assert watch(linear(), codes(w), 0.1, lambda: w) == []
    assert words(watch(linear(), codes(w), 0.51, lambda: w)) == ["large error"]
    dead = w.clone()
    dead[7] = 0
    assert words(watch(linear(), codes(dead), 0.1, lambda: w)) == ["zero rows"]
    assert watch(linear(), codes(dead), 0.1, lambda: dead) == []
    assert words(watch(linear(), dead, 0.1, lambda: codes(w))) == ["zero rows"]
    tiny = codes(w * 1e-6, dtype=torch.float16)
    assert words(watch(linear(), tiny, 0.1, lambda: tiny)) == ["clamped"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_an_error_with_its_name(value: float) -> None:
    q = codes(torch.randn(64, 96))
    q.scale[3, 1] = value
    with pytest.raises(InputError, match=r"'m\.layers\.0\.q\.weight'") as caught:
        watch(linear(), q, 0.1, lambda: q)
    assert "among its scales" in str(caught.value)


def test_a_run_counts_it(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pruning nearly all of a matrix costs most of it; the manifest has the names, and `show` prints them."""
    result = run(tiny, tmp_path / "out", "prune.magnitude(sparsity=0.95, scope=matrix)")
    notes = {note.what: note for note in result.manifest.notes}
    assert notes["large error"].count == 14
    with pytest.raises(SystemExit) as ended:
        app(["show"])(["show", str(tmp_path / "out")])
    assert ended.value.code in (0, None)
    assert "large error: 14 (the pass has cost more than 50% of the weight's norm): model.layers.0" in capsys.readouterr().out
    # An error of a weight that the next pass makes anew is that pass's to tell.
    small = run(tmp_path / "out", tmp_path / "codes", "quantize.rtn(scheme=w8a16)").manifest
    assert "large error" not in {note.what for note in small.notes}


def test_clamped_scales_are_counted(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {k: (v * (1e-4 if k == name else 1)).half() for k, v in tensors.items()}, source / "model.safetensors", {"format": "pt"}
    )
    text = (source / "config.json").read_text().replace("bfloat16", "float16")
    (source / "config.json").write_text(text)
    (note,) = [n for n in run(source, tmp_path / "out", "quantize.rtn(scheme=w4a16g32)").manifest.notes if n.what == "clamped"]
    assert note.names == (name,)


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
