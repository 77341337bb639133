"""Modules of codes: they run what codes, outliers and factors mean, and learn all of it that moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.architecture.qlinear import with_codes
from compress.checkpoint.reader import open_checkpoint
from compress.numerics import qtensor
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from support import do, in_state, linear, losses, ready_inputs, step_of


@pytest.mark.parametrize("scheme", ["w3a16g16-asym", "w4a16g16-min", "nf4g16", "mxfp4"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_module_runs_what_it_means_and_learns_all_that_moves(scheme: str, kind: str) -> None:
    """Gradients of the gain, but for outliers, and of both factors, against autograd on the plain formula."""
    state = State(Scheme.parse(scheme), None, Outliers(0.05), Lowrank(3))
    q = in_state(linear((20, 32)), state).plain()
    module = nn.Linear(32, 20, bias=False) if kind == "linear" else nn.Embedding(20, 32)
    with_codes(module, q, torch.float32, torch.float32)
    x = torch.randn(5, 32) if kind == "linear" else torch.tensor([[3, 3, 19], [0, 7, 3]])
    run_ = (lambda w: x @ w.T) if kind == "linear" else (lambda w: w[x])
    torch.testing.assert_close(module(x), run_(q.dequantize()))
    found = module.learn()
    assert q.lowrank is not None
    assert q.outliers is not None
    left, right = (part.float().clone().requires_grad_() for part in (q.lowrank.left, q.lowrank.right))
    gain = torch.ones_like(q.scale, requires_grad=True)
    mask = q.outliers.put(torch.zeros(20, 32)).bool()
    plain = replace(q, outliers=None, lowrank=None).dequantize()
    group = 32 // q.scale.shape[1]
    fixed = 0 if q.minimum is None else q.minimum.float().repeat_interleave(group, 1)
    coded = (plain - fixed) * gain.repeat_interleave(group, 1) + fixed
    dense = torch.where(mask, q.outliers.put(torch.zeros(20, 32)), coded) + left @ right
    weight = torch.randn(run_(dense).shape)
    (run_(dense) * weight).sum().backward()
    (module(x) * weight).sum().backward()
    assert found.keys() == {"left", "right"} | (set() if scheme == "mxfp4" else {"gain"})
    for name, wanted in (("gain", gain), ("left", left), ("right", right)):
        if name in found:
            torch.testing.assert_close(found[name].grad, wanted.grad)


@pytest.mark.parametrize("scheme", ["w2a16g32-asym", "w3a16g32-min", "mxfp4"])
def test_training_moves_scales_and_factors_and_nothing_else(scheme: str, tiny: Path, tmp_path: Path) -> None:
    data = f"calibrate(data='{ready_inputs()}', samples=6)"
    made = f"{data} | quantize.loftq(scheme={scheme}, rank=4, iterations=1, outliers=0.01)"
    do(tiny, tmp_path / "out", f"{made} | distill.logits(batch=6, micro_batch=3, epochs=8, lr=1e-3)")
    before, after = open_checkpoint(step_of(tmp_path / "out", "quantize.loftq")), open_checkpoint(tmp_path / "out")
    assert {n: str(e.state) for n, e in before.logical.items()} == {n: str(e.state) for n, e in after.logical.items()}
    quantized = [name for name, entry in before.logical.items() if entry.state.scheme]
    assert quantized
    for name in quantized:
        moved = {part for part in qtensor.PARTS if f"{name}.{part}" in before.refs
                 and not torch.equal(before.read(f"{name}.{part}"), after.read(f"{name}.{part}"))}  # fmt: skip
        assert {"left", "right"} <= moved <= {"left", "right", "scale"}
        assert ("scale" in moved) == (scheme != "mxfp4")
    record = losses(tmp_path / "out")
    assert record[-1] < record[0]


def test_int8_factors_stay(tiny: Path, tmp_path: Path) -> None:
    made = "quantize.rtn(scheme=w3a16g32) | quantize.lorc(rank=2)"
    data = f"calibrate(data='{ready_inputs()}', samples=6)"
    do(tiny, tmp_path / "out", f"{data} | {made} | distill.logits(batch=6, micro_batch=3, epochs=1)")
    before, after = open_checkpoint(step_of(tmp_path / "out", "quantize.lorc")), open_checkpoint(tmp_path / "out")
    for part in ("left", "right", "rank_scale"):
        name = f"model.layers.0.mlp.up_proj.weight.{part}"
        assert torch.equal(before.read(name), after.read(name))
