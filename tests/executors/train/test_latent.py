"""Latent weights: training chooses codes anew, in every scheme; zeros stay, and a killed run ends at the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError
from compress.executors.train.record import Record
from compress.layerwise.dense_view import DenseView
from compress.numerics.qtensor import QTensor
from support import do, few, losses, ready_inputs, step_of, tiny_llama, tree

ROUND = "quantize.rtn(scheme=w3a16g32, ragged=divide)"
TRAIN = f"distill.logits(data='{ready_inputs()}', samples=6, batch=6, micro_batch=3, latent=true"


def qtensors(folder: Path) -> dict[str, QTensor]:
    view = DenseView(open_checkpoint(folder))
    found = {name: view.qtensor(name) for name, (_, state) in view.weights.items() if state.scheme is not None}
    return {name: q for name, q in found.items() if q is not None}


@pytest.mark.parametrize("scheme", [
    "w2a16g32", "w3a16g32-asym", "w8a8", "nvfp4",
    *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("w4a16g32-min", "nf4g32", "mxfp4", "fp8-afp8")),
])  # fmt: skip
def test_codes_move_and_the_loss_falls_below_that_of_scales_alone(scheme: str, tiny: Path, tmp_path: Path) -> None:
    before = f"quantize.rtn(scheme={scheme}, ragged=divide) | {TRAIN}, epochs=20, schedule=linear, targets=[linear]"
    do(tiny, tmp_path / "out", f"{before}, code_lr=0.03)")
    old, new = qtensors(step_of(tmp_path / "out", "quantize.rtn")), qtensors(tmp_path / "out")
    assert sum(int((q.codes != new[name].codes).sum()) for name, q in old.items())
    assert all(q.scheme == new[name].scheme and q.codes.shape == new[name].codes.shape for name, q in old.items())
    found = losses(tmp_path / "out")
    assert found[-1] < 0.9 * found[0]
    if scheme in ("w2a16g32", "w3a16g32-asym"):
        do(tiny, tmp_path / "scales", f"{before.replace(', latent=true', '')})")
        assert found[-1] < losses(tmp_path / "scales")[-1]


@pytest.mark.parametrize("name", few(["mixtral", "gpt2", "gpt_oss", "phi3"], "gpt2", "gpt_oss"))
def test_every_family_learns(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Also where experts or projections are fused on load, and with a Conv1D."""
    targets = "[linear, experts]" if name in ("mixtral", "gpt_oss") else "[linear]"
    before = f"quantize.rtn(scheme=w3a16g8, ragged=divide, targets={targets})"
    do(source(name), tmp_path / "out", f"{before} | {TRAIN}, epochs=20, code_lr=0.02, schedule=linear)")
    found = losses(tmp_path / "out")
    assert found[-1] < 0.8 * found[0]


def test_tied_embeddings_share_their_latent_weights(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    before = "quantize.rtn(scheme=w4a16g32, targets=[linear, embeddings], ragged=divide)"
    do(model, tmp_path / "out", f"{before} | {TRAIN}, epochs=10, code_lr=0.05)")
    old, new = qtensors(step_of(tmp_path / "out", "quantize.rtn")), qtensors(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert not torch.equal(old[name].codes, new[name].codes)
    found = losses(tmp_path / "out")
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("prune", ["prune.magnitude(sparsity=0.5)", "prune.magnitude(sparsity=2:4)"])
def test_zeros_stay(prune: str, tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{prune} | {ROUND} | {TRAIN}, epochs=10, code_lr=0.2)")
    masked = step_of(tmp_path / "out", prune.partition("(")[0])
    view = DenseView(open_checkpoint(masked))
    for name, q in qtensors(tmp_path / "out").items():
        zeros = view.dense(name) == 0
        assert zeros.any()
        assert not q.dequantize()[zeros].any()


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the state after its second step."""
    recipe = f"{ROUND} | {TRAIN}, epochs=4, save_every=2)"
    do(tiny, tmp_path / "whole", recipe)
    real = Record.add

    def add(self: Record, **row: Any) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt
        real(self, **row)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", add)
        with pytest.raises(KeyboardInterrupt):
            do(tiny, tmp_path / "out", recipe)
    do(tiny, tmp_path / "out", recipe)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_codes_of_another_run_start_from_the_teachers_weights(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "codes", ROUND)
    do(tmp_path / "codes", tmp_path / "out", f"{TRAIN}, teacher='{tiny}', epochs=2)")
    do(tiny, tmp_path / "one", f"{ROUND} | {TRAIN}, epochs=2)")
    assert losses(tmp_path / "out") == losses(tmp_path / "one")


def test_what_is_trained_is_said(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"{ROUND} | {TRAIN}, epochs=1)")
    said = {note.reason for note in result.manifest.notes if note.what == "trained"}
    assert said == {"codes and scales, by distill.logits", "weights, by distill.logits"}
    with pytest.raises(CompressError, match="kept columns have taken up"):
        do(tiny, tmp_path / "quik", f"calibrate(data='{ready_inputs()}', samples=4) | quantize.quik(outliers=16) | {TRAIN})")
    with pytest.raises(CompressError, match="code_lr: only with latent=true"):
        do(tiny, tmp_path / "no", f"{ROUND} | distill.logits(data='{ready_inputs()}', code_lr=0.1)")
