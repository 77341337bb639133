"""Anomalies: what is odd in a weight is counted with its name, in the manifest and by `show`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.cli.app import build as app
from compress.errors import InputError
from compress.executors.anomalies import watch
from compress.numerics.grid import round_to_nearest
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from support import linear, run


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


@pytest.mark.parametrize("name", ["scale", "minimum", "super_scale", "super_minimum"])
def test_so_is_a_minimum_and_what_scales_are_multiplied_by(name: str) -> None:
    q = nearest(torch.randn(4, 256), Scheme.parse("q4_k" if "super" in name else "w4a16g32-min"), torch.bfloat16).q
    getattr(q, name)[2, 0] = float("nan")
    with pytest.raises(InputError, match="among its scales"):
        watch(linear((4, 256)), q, 0.1, lambda: q)


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
