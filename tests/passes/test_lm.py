"""train.lm: the cross entropy of texts, and no teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import do, load, losses, ready_inputs, step_of

LM = f"train.lm(data='{ready_inputs()}', samples=6, batch=6, micro_batch=3"


def test_the_loss_is_the_cross_entropy_of_the_next_token(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{LM}, epochs=8, lr=3e-3)")
    ids = load_file(ready_inputs())["input_ids"].long()
    with torch.no_grad():
        expected = load(tiny, dtype=torch.float32)(input_ids=ids, labels=ids).loss
    found = losses(tmp_path / "out")
    assert found[0] == pytest.approx(float(expected), rel=1e-4)
    assert found[-1] < 0.95 * found[0]


def test_it_reads_no_teacher_and_holds_zeros(tiny: Path, tmp_path: Path) -> None:
    result = do(tiny, tmp_path / "out", f"prune.magnitude(sparsity=2:4) | {LM}, lr=1e-2)")
    assert "teacher" not in result.manifest.lineage[-1].inputs
    before = load_file(step_of(tmp_path / "out", "prune.magnitude") / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    for name in result.manifest.weights:
        assert bool((after[name][before[name] == 0] == 0).all())
        assert not torch.equal(after[name], before[name])


def test_it_equals_distillation_without_a_divergence(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "lm", f"{LM}, epochs=2)")
    do(tiny, tmp_path / "ce", f"{LM.replace('train.lm', 'distill.logits')}, epochs=2, kl=0, ce=1)")
    assert losses(tmp_path / "lm") == losses(tmp_path / "ce")
    assert (tmp_path / "lm/model.safetensors").read_bytes() == (tmp_path / "ce/model.safetensors").read_bytes()
