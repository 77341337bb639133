"""Learned codes: every scheme comes closer, zeros stay, and a crash or a second process changes no byte and no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, CoverageError
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build as model_of
from forked import compress
from support import do, goes_on, ready_inputs, rows, shared, step_of, tensors, tiny_llama, tree

CALIBRATE = f"calibrate(data='{ready_inputs(12)}', samples=12)"
LEARN = "quantize.learned(epochs=6, batch=4, micro_batch=4, held_out=0"
ROUND = "quantize.rtn(scheme=w3a16g32, ragged=divide)"


@pytest.mark.parametrize("scheme", shared([
    "w2a16g32", "w3a16g32-asym", "w4a16g32-min", "w8a8", "nf4g32", "fp4g32", "mxfp4", "nvfp4", "fp8-afp8", "w4a8g32-afp8",
]))  # fmt: skip
def test_every_scheme_comes_closer(scheme: str, tiny: Path, tmp_path: Path) -> None:
    """In each block, and in what the model predicts."""
    do(tiny, tmp_path / "out", f"{CALIBRATE} | quantize.rtn(scheme={scheme}, ragged=divide) | {LEARN})")
    losses = rows(tmp_path / "out")
    assert len(losses) == 2
    assert all(row["loss"] < row["start"] for row in losses), losses
    ids = load_file(tmp_path / "out/calibration.safetensors")["input_ids"].long()
    folders = (tiny, step_of(tmp_path / "out", "quantize.rtn"), tmp_path / "out")
    dense, before, after = (model_of(open_checkpoint(folder))(ids).logits.detach() for folder in folders)
    assert float((after - dense).square().mean()) < float((before - dense).square().mean())


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k"])
def test_k_quants_come_closer_and_keep_their_scales(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    do(model, tmp_path / "out", f"{CALIBRATE} | quantize.rtn(scheme={scheme}) | {LEARN})")
    assert all(row["loss"] < row["start"] for row in rows(tmp_path / "out")), rows(tmp_path / "out")
    old, new = tensors(step_of(tmp_path / "out", "quantize.rtn")), tensors(tmp_path / "out")
    moved = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"codes"}


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "gpt_oss", "phi3"])
def test_every_family_comes_closer(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Also where experts or projections are fused on load, and with a Conv1D."""
    targets = "[linear, experts]" if name in ("mixtral", "gpt_oss") else "[linear]"
    before = f"quantize.rtn(scheme=w3a16g8, ragged=divide, targets={targets})"
    do(source(name), tmp_path / "out", f"{CALIBRATE} | {before} | {LEARN})")
    assert all(row["loss"] < row["start"] for row in rows(tmp_path / "out")), rows(tmp_path / "out")


def test_codes_move_by_a_step_at_most_and_scales_too(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{CALIBRATE} | {ROUND} | {LEARN}, keep=last)")
    (old, new), moved = (_codes(folder) for folder in (step_of(tmp_path / "out", "quantize.rtn"), tmp_path / "out")), 0
    for name, q in old.items():
        apart = (q.codes.int() - new[name].codes.int()).abs()
        assert int(apart.max()) <= 1
        moved += int(apart.sum())
        assert not torch.equal(q.scale, new[name].scale)
    assert moved
    with_reach = f"{CALIBRATE} | {ROUND} | {LEARN}, keep=last, optimizer=adamw, lr=0.3, reach=3)"
    do(tiny, tmp_path / "far", with_reach)
    far = _codes(tmp_path / "far")
    assert 1 < max(int((q.codes.int() - far[name].codes.int()).abs().max()) for name, q in old.items()) <= 3


def _codes(folder: Path) -> dict[str, Any]:
    view = DenseView(open_checkpoint(folder))
    return {name: view.qtensor(name) for name, (_, state) in view.weights.items() if state.scheme is not None}


@pytest.mark.parametrize("prune", ["prune.magnitude(sparsity=0.5)", "prune.magnitude(sparsity=2:4)"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w4a16g32-asym", "nf4g32"])
def test_pruned_weights_stay_zeros(prune: str, scheme: str, tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{CALIBRATE} | {prune} | quantize.rtn(scheme={scheme}, ragged=divide) | {LEARN}, keep=last)")
    masks, old = tensors(step_of(tmp_path / "out", "prune.magnitude")), _codes(step_of(tmp_path / "out", "quantize.rtn"))
    new = _codes(tmp_path / "out")
    for name, q in new.items():
        assert not q.dequantize()[masks[name] == 0].any(), name
    assert any(not torch.equal(q.codes, new[name].codes) for name, q in old.items())


def test_outliers_and_factors_stay_as_they_are(tiny: Path, tmp_path: Path) -> None:
    before = "quantize.rtn(scheme=w3a16g32, ragged=divide, outliers=0.01) | quantize.lorc(rank=4)"
    do(tiny, tmp_path / "out", f"{CALIBRATE} | {before} | {LEARN})")
    assert all(row["loss"] < row["start"] for row in rows(tmp_path / "out"))
    old, new = tensors(step_of(tmp_path / "out", "quantize.lorc")), tensors(tmp_path / "out")
    for name, tensor in old.items():
        if name.endswith((".left", ".right", ".outlier_values", ".outlier_columns", ".outlier_offsets")):
            assert torch.equal(tensor, new[name]), name


def test_codes_of_another_run_start_at_their_middles(tiny: Path, tmp_path: Path) -> None:
    """Their dense weights are the teacher's, if at all: the step that read them is not here."""
    do(tiny, tmp_path / "codes", ROUND)
    do(tmp_path / "codes", tmp_path / "out", f"{CALIBRATE} | {LEARN}, teacher='{tiny}')")
    assert all(row["loss"] < row["start"] for row in rows(tmp_path / "out"))


@pytest.mark.parametrize("scheme", ["w3a16g32", "nvfp4", "fp8"])
def test_without_a_step_every_byte_is_what_it_was(scheme: str, tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{CALIBRATE} | quantize.rtn(scheme={scheme}, ragged=divide) | quantize.learned(epochs=0)")
    old, new = (
        {n: b for n, b in tree(folder).items() if n.endswith("safetensors")}
        for folder in (step_of(tmp_path / "out", "quantize.rtn"), tmp_path / "out")
    )
    assert old == new


@pytest.mark.parametrize("at", [3, 12])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    at: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on(monkeypatch, tiny, tmp_path, f"{CALIBRATE} | {ROUND} | {LEARN})", "learned", at)


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", dtype="float32")
    recipe = f"{CALIBRATE} | {ROUND} | quantize.learned(epochs=4, batch=4, micro_batch=2, optimizer=adamw, lr=0.05)"
    for ranks in (1, 2):
        done = compress("run", model, tmp_path / str(ranks), "-p", recipe, "--dtype", "float32", "--threads", 1, ranks=ranks)
        assert done.returncode == 0, done.stderr
    for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_what_cannot_be_chosen_is_refused_or_counted(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{CALIBRATE} | {ROUND} | {LEARN}, lr=0.01)")
    assert {note.reason for note in result.manifest.notes if note.what == "trained"} == {"codes and scales, by quantize.learned"}
    with pytest.raises(CoverageError, match="codes alone are chosen here"):
        do(tiny, tmp_path / "dense", f"{CALIBRATE} | {LEARN}, targets=[linear])")
    with pytest.raises(CompressError, match="micro_batch=4 is more than batch=2"):
        do(tiny, tmp_path / "no", f"{CALIBRATE} | {ROUND} | quantize.learned(batch=2, micro_batch=4)")
