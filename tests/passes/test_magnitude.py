"""prune.magnitude: the pattern is a fact that later passes keep, and the result is an ordinary dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CoverageError
from compress.executors import stream
from compress.layerwise.dense_view import DenseView
from compress.numerics.masks import holds
from compress.spec.sparsity import Sparsity
from support import load, logits, run, step_of


@pytest.mark.parametrize("text", ["2:4", "4:8", "0.5", "0.9"])
def test_zeros_where_the_oracle_has_them_and_the_rest_bit_equal(text: str, tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", f"prune.magnitude(sparsity={text})")
    source, out = open_checkpoint(tiny), open_checkpoint(tmp_path / "out")
    targeted = set(result.plan.steps[0].transformed)
    assert len(targeted) == 14
    for weight in resolve(out).weights:
        before, after = source.read(weight.name), out.read(weight.name)
        if weight.name not in targeted:
            assert torch.equal(before, after)
            continue
        kept = after != 0
        assert torch.equal(before[kept], after[kept])
        assert holds(kept, Sparsity.parse(text))
        if "." in text:
            assert int((~kept).sum()) == int(weight.numel * float(text))
            assert before[kept].abs().min() >= before[~kept].abs().max()
        assert not torch.signbit(after[~kept]).any(), "zeros are +0.0"
        error = float((before - after).float().norm() / before.float().norm())
        assert result.manifest.weights[weight.name].error == pytest.approx(error, rel=1e-3)
    assert not torch.equal(logits(load(tmp_path / "out")), logits(load(tiny)))


@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16g32-asym", "w8a16"])
def test_quantizing_keeps_the_zeros(scheme: str, tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", f"prune.magnitude(sparsity=2:4) | quantize.rtn(scheme={scheme}) | pack(dequantize=true)")
    assert {record.state for record in result.manifest.weights.values()} == {f"codes({scheme})+masked(2:4)"}
    pruned = open_checkpoint(step_of(tmp_path / "out", "prune.magnitude"))
    dense_view = DenseView(open_checkpoint(tmp_path / "out"))
    for name in result.manifest.weights:
        assert bool((dense_view.dense(name)[pruned.read(name) == 0] == 0).all())
        assert holds(dense_view.dense(name) != 0, Sparsity.parse("2:4"))


def test_a_pass_that_loses_the_zeros_is_stopped(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.numerics.masks.holds", lambda nonzero, sparsity: False)
    with pytest.raises(AssertionError, match=r"not masked\(2:4\)"):
        run(tiny, tmp_path / "out", "prune.magnitude(sparsity=2:4)")
    assert not (tmp_path / "out").exists()
    assert stream.check_mask


def test_conv1d_is_pruned_along_its_inputs(tmp_path: Path) -> None:
    from families import build

    source = build("gpt2", tmp_path / "gpt2")
    result = run(source, tmp_path / "out", "prune.magnitude(sparsity=2:4)")
    out = open_checkpoint(tmp_path / "out")
    weights = [w for w in resolve(out).weights if w.name in result.manifest.weights]
    assert all(weight.transposed for weight in weights)
    for weight in weights:
        assert holds(out.read(weight.name).T != 0, Sparsity.parse("2:4"))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("prune.magnitude(sparsity=2:4) | prune.magnitude(sparsity=0.7)", "already masked(2:4)"),
        ("quantize.rtn(scheme=w4a16g32) | prune.magnitude(sparsity=2:4)", "already codes(w4a16g32)"),
        ("prune.magnitude(sparsity=3:7)", "7 does not divide"),
    ],
)
def test_what_cannot_be(recipe: str, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CoverageError) as caught:
        run(tiny, tmp_path / "out", recipe)
    assert said in str(caught.value)
