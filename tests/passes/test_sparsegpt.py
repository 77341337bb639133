"""prune.sparsegpt, refits, and quantize.gptq with zeros as passes: what is written, counted and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.contract.discover import load_pass
from compress.contract.shapes import LinearPass
from compress.contract.tasks import MatrixTask, Solution
from compress.errors import CoverageError, RecipeError
from compress.layerwise.dense_view import DenseView
from compress.numerics.masks import holds, keep_best
from compress.numerics.qtensor import QTensor
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import State
from families import build, inputs_for
from support import CALIBRATE, dense_meaning, kl, linear, load, logits, ready_inputs, run, step_of

FEW = CALIBRATE.replace("samples=32", "samples=12")
READY = f"calibrate(data='{ready_inputs()}', samples=6)"


@pytest.mark.slow
def test_it_is_ahead_of_wanda_and_a_refit_of_both(demo_model: Path, tmp_path: Path) -> None:
    """On trained weights, by KL to the source."""
    found = {}
    for method in (
        "wanda(sparsity=2:4",
        "wanda(sparsity=2:4, refit=true",
        "sparsegpt(sparsity=2:4, refit=false",
        "sparsegpt(sparsity=2:4",
    ):
        run(demo_model, tmp_path / str(len(found)), f"{FEW} | prune.{method})")
        found[method] = kl(demo_model, tmp_path / str(len(found)))
    wanda, wanda_refitted, printed, sparsegpt = found.values()
    assert wanda_refitted < 0.95 * wanda
    assert printed < 0.95 * wanda
    assert sparsegpt < 0.95 * printed


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", "0.5, scope=row, refit=false"), ("gpt2", "2:4, refit=false"), ("mixtral", "4:8, order=activation, refit=false"), ("qwen3", "0.6, solver=alps"), ("gpt_oss", "0.7, block=32, refit=true"),
     ("t5", "2:4, refit=true")],
)  # fmt: skip
def test_patterns_and_zeros_of_many_families(name: str, options: str, tmp_path: Path) -> None:
    """Groups run along the inputs, of turned weights too; zeros are +0.0; what is not targeted keeps its bytes."""
    source, sparsity = build(name, tmp_path), Sparsity.parse(options.split(",")[0])
    run(
        source,
        tmp_path / "out",
        f"calibrate(data='{inputs_for(name, tmp_path)}', samples=5) | prune.sparsegpt(sparsity={options})",
    )
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.manifest is not None
    for weight in resolve(after).weights:
        old, new = before.read(weight.name), after.read(weight.name)
        if weight.name not in after.manifest.weights:
            assert torch.equal(old, new)
            continue
        assert holds((new.transpose(-1, -2) if weight.transposed else new) != 0, sparsity), weight.name
        assert not torch.signbit(new[new == 0]).any()
        assert torch.isfinite(new).all()
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_starved_experts_are_pruned_by_magnitude_and_counted(tmp_path: Path) -> None:
    source, calibrate = build("mixtral", tmp_path), f"calibrate(data='{ready_inputs(1)}', samples=1)"
    result = run(source, tmp_path / "out", f"{calibrate} | prune.sparsegpt(sparsity=2:4, min_tokens=12)")
    (note,) = [note for note in result.manifest.notes if note.what == "fallback"]
    assert note.reason == "fewer than 12 calibration tokens: pruned by magnitude"
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    for name in note.names:
        old = before.read(name)
        assert torch.equal(after.read(name), old * keep_best(old.float().abs(), Sparsity.parse("2:4")))
    again = run(source, tmp_path / "alps", f"{calibrate} | prune.sparsegpt(sparsity=2:4, min_tokens=12, solver=alps)")
    # Of the first block, since other weights there send tokens to other experts in the next one.
    (same,) = [note.names[0] for note in again.manifest.notes if note.what == "fallback"]
    assert torch.equal(open_checkpoint(again.out).read(same), after.read(same))
    refitted = run(source, tmp_path / "wanda", f"{calibrate} | prune.wanda(sparsity=2:4, refit=true)")
    (note,) = [note for note in refitted.manifest.notes if note.what == "fallback"]
    assert note.reason == "fewer than 32 calibration tokens: not refitted"


def solved(name: str, options: dict[str, str], after: str, w: torch.Tensor, x: torch.Tensor) -> Solution:
    """What a pass makes of a matrix whose inputs are `x`."""
    pass_ = load_pass(name).model_validate(options)
    assert isinstance(pass_, LinearPass)
    statistic = pass_.statistic(x.shape[1])
    statistic.add(x)
    return pass_.solve([MatrixTask(linear(tuple(w.shape)), State.parse(after), w)], pass_.prepare(statistic))[0]


@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w2a16g32", "fp8"])
def test_pruned_and_quantized_in_one_solve_outputs_err_less(sparsity: str, scheme: str) -> None:
    """Than pruned, and then quantized towards what that had made of the outputs (a statistic, on fixed seeds)."""
    errors = [0.0, 0.0]
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(384, 96, generator=g) @ (torch.randn(96, 96, generator=g) / 10 + torch.eye(96))
        w, state = torch.randn(64, 96, generator=g), f"codes({scheme})+masked({sparsity})"
        pruned = solved("prune.sparsegpt", {"sparsity": sparsity, "refit": "false"}, f"masked({sparsity})", w, x).value
        assert isinstance(pruned, torch.Tensor)
        after = solved("quantize.gptq", {"scheme": scheme}, state, pruned, x).value
        together = solved("quantize.gptq", {"scheme": scheme, "sparsity": sparsity}, state, w, x)
        for place, q in enumerate((together.value, after)):
            assert isinstance(q, QTensor)
            assert holds(q.nonzero(), Sparsity.parse(sparsity))
            errors[place] += float(((w - q.dequantize()) @ x.T).square().sum()) / len(x)
        if not seed:
            assert together.output_lost == pytest.approx(errors[0], rel=1e-3)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["gpt2", "tiny"])
def test_codes_with_zeros_are_packed_and_loaded(name: str, tiny: Path, tmp_path: Path) -> None:
    source = tiny if name == "tiny" else build(name, tmp_path)
    run(source, tmp_path / "out", f"{READY} | quantize.gptq(scheme=w4a16g32, sparsity=2:4)")
    step = open_checkpoint(tmp_path / "out")
    for weight in resolve(step).weights:
        if step.manifest is not None and weight.name in step.manifest.weights:
            dense = DenseView(step).dense(weight.name)
            assert holds((dense.T if weight.transposed else dense) != 0, Sparsity.parse("2:4"))
    if name == "tiny":
        run(source, tmp_path / "packed", f"{READY} | quantize.gptq(scheme=w4a16g32, sparsity=2:4) | pack")
        wanted = logits(load(dense_meaning(step_of(tmp_path / "packed", "quantize.gptq"), tmp_path / "dense")))
        assert torch.equal(logits(load(tmp_path / "packed")), wanted)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("prune.sparsegpt(sparsity=3:7)", "7 does not divide"),
        ("prune.sparsegpt(sparsity=0.999)", "0.999 of zeros leaves 5 weights for 64 outputs, so some would be empty"),
        ("prune.wanda(sparsity=2:4) | quantize.gptq(scheme=w4a16g32, sparsity=2:4)", "already masked(2:4)"),
        ("quantize.gptq(scheme=nvfp4, sparsity=2:4)", "measured before anything is pruned"),
    ],
)
def test_what_cannot_be(recipe: str, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CoverageError) as caught:
        run(tiny, tmp_path / "out", f"{READY} | {recipe}")
    assert said in str(caught.value)
    assert not (tmp_path / "out.steps").exists(), "refused before a byte moves"


def test_outliers_are_not_taken_out_of_what_is_pruned(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="outliers: not with sparsity"):
        run(tiny, tmp_path / "out", f"{READY} | quantize.gptq(scheme=w4a16g32, sparsity=2:4, outliers=0.01)")
