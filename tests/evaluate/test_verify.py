"""Verify: a number in an artifact that is none is told, wherever it stands."""

from __future__ import annotations

from pathlib import Path

from compress.checkpoint.reader import open_checkpoint
from support import run


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
