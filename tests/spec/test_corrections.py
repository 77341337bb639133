"""What stands beside codes: its text, its bytes, its meaning, and the modules that run it and learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.architecture.qlinear import with_codes
from compress.checkpoint.reader import open_checkpoint
from compress.errors import UsageError
from compress.numerics import qtensor
from compress.numerics.lowrank import Factors
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest, stacked, unstacked
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight
from support import do, linear, losses, ready_inputs, run, step_of

STATES = [
    "dense", "masked(2:4)", "codes(w4a16g64)", "codes(w4a16g64)+masked(0.5)", "codes(w2a16g64-asym)+outliers(0.005)",
    "codes(nvfp4)+lowrank(r8-int8)", "codes(w2a16g64-asym)+outliers(0.005)+lowrank(r8)",
    "codes(w4a16g64)+masked(2:4)+outliers(0.01)",
]  # fmt: skip


@pytest.mark.parametrize("text", STATES)
def test_states_print_back(text: str) -> None:
    assert str(State.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "outliers(0.1)", "lowrank(r8)", "masked(2:4)+lowrank(r8)", "dense+outliers(0.1)", "+masked(2:4)"]
)
def test_other_states_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unknown state"):
        State.parse(text)


@pytest.mark.parametrize("text", ["r0", "8", "r8-int4", "r-8", "r8 "])
def test_other_ranks_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Lowrank.parse(text)


def test_shares_print_back() -> None:
    for share in (0.005, 0.5, 1e-05, 0.0001):
        assert Outliers.parse(str(Outliers(share))) == Outliers(share)
    for text in ("0", "1", "1.0", "x", "-0.1"):
        with pytest.raises(UsageError):
            Outliers.parse(text)


def whole(weight: Weight, state: State) -> QTensor:
    """A random weight in a state."""
    assert state.scheme is not None
    lead = () if weight.experts is None else (weight.experts,)
    w = torch.randn(*lead, weight.rows, weight.columns).bfloat16()
    q = nearest(w, state.scheme, torch.bfloat16, outliers=state.outliers).q
    if state.lowrank is None:
        return q
    left, right = torch.randn(*lead, weight.rows, state.lowrank.rank), torch.randn(*lead, state.lowrank.rank, weight.columns)
    if not state.lowrank.int8:
        return replace(q, lowrank=Factors(left.bfloat16(), right.bfloat16()))
    scale = torch.rand(*lead, state.lowrank.rank) / 1000
    return replace(q, lowrank=Factors((left * 40).to(torch.int8), (right * 40).to(torch.int8), scale))


PLACES = {
    "linear": linear((48, 96)), "conv1d": linear((64, 96), transposed=True, module_class="Conv1D"),
    "fused": linear((3, 48, 64), kind="expert"), "fused, turned": linear((3, 64, 48), kind="expert", transposed=True),
    "wide": linear((2, 70000)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", ["codes(w3a16g32-asym)+outliers(0.02)", "codes(nf4g16)+lowrank(r5)",
                                  "codes(fp8)+outliers(0.001)+lowrank(r2-int8)"])  # fmt: skip
def test_bytes_are_declared_and_come_back(text: str, place: str) -> None:
    weight, state = PLACES[place], State.parse(text)
    q = whole(weight, state)
    tensors = qtensor.encode(weight, q)
    assert {s.name: (s.shape, s.nbytes) for s in qtensor.specs(weight, state)} == {
        n: (tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()
    }
    back = qtensor.decode(weight, state, tensors)
    assert torch.equal(back.dequantize(), q.dequantize())
    if weight.experts is not None:
        assert torch.equal(torch.stack([part.dequantize() for part in unstacked(back)]), q.dequantize())
        assert torch.equal(stacked(unstacked(back)).dequantize(), q.dequantize())


def test_outliers_replace_and_factors_are_added() -> None:
    weight, state = linear((20, 32)), State.parse("codes(w2a16g16)+outliers(0.05)+lowrank(r3)")
    q = whole(weight, state)
    assert q.outliers is not None
    assert q.lowrank is not None
    for i in range(20):
        entries = range(int(q.outliers.offsets[i]), int(q.outliers.offsets[i + 1]))
        kept = {int(q.outliers.columns[n]): float(q.outliers.values[n]) for n in entries}
        for j in range(32):
            coded = float(q.scale[i, j // 16]) * (int(q.codes[i, j]) - 2)
            added = sum(float(q.lowrank.left[i, k]) * float(q.lowrank.right[k, j]) for k in range(3))
            assert float(q.dequantize()[i, j]) == pytest.approx(kept.get(j, coded) + added, abs=1e-4)


def test_bits_are_those_of_the_parts() -> None:
    """b + scale and zero + values and indices + offsets, and 16 r (rows + columns) of factors."""
    weight, state = linear((256, 1024)), State.parse("codes(w2a16g128-asym)+outliers(0.005)+lowrank(r8)")
    bits = 8 * sum(spec.nbytes for spec in qtensor.specs(weight, state)) / weight.numel
    kept = round(0.005 * weight.numel)
    assert bits == pytest.approx(2 + 24 / 128 + (kept * 32 + 257 * 32 + 16 * 8 * (256 + 1024)) / weight.numel, rel=1e-12)


@pytest.mark.parametrize("scheme", ["w3a16g16-asym", "nf4g16", "mxfp4"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_module_runs_what_it_means_and_learns_all_that_moves(scheme: str, kind: str) -> None:
    """Gradients of the gain, but for outliers, and of both factors, against autograd on the plain formula."""
    state = State(Scheme.parse(scheme), None, Outliers(0.05), Lowrank(3))
    q = whole(linear((20, 32)), state).plain()
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
    coded = plain * gain.repeat_interleave(group, 1)
    dense = torch.where(mask, q.outliers.put(torch.zeros(20, 32)), coded) + left @ right
    weight = torch.randn(run_(dense).shape)
    (run_(dense) * weight).sum().backward()
    (module(x) * weight).sum().backward()
    assert found.keys() == {"left", "right"} | (set() if scheme == "mxfp4" else {"gain"})
    for name, wanted in (("gain", gain), ("left", left), ("right", right)):
        if name in found:
            torch.testing.assert_close(found[name].grad, wanted.grad)


@pytest.mark.parametrize("scheme", ["w2a16g32-asym", "mxfp4"])
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


def test_an_artifact_is_damaged_where_a_factor_is(tiny: Path, tmp_path: Path) -> None:
    """NaN in a factor is told, as it is in a scale."""
    from compress.evaluate.verify import _wrong
    from compress.layerwise.dense_view import DenseView

    run(tiny, tmp_path / "out", "quantize.rtn(scheme=w3a16g32) | quantize.lorc(rank=2, factors=bf16)")
    dense_view = DenseView(open_checkpoint(tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert _wrong(dense_view, name, {}) is None
    q = dense_view.qtensor(name)
    assert q is not None
    assert q.lowrank is not None
    q.lowrank.left[0, 0] = float("nan")
    dense_view.qtensor = lambda _: q  # type: ignore[method-assign]
    problem = _wrong(dense_view, name, {})
    assert problem is not None
