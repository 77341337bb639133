"""quantize.gptq and calibrate as passes: quality on the trained model, fallback, damping, readers, messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.reader import open_checkpoint
from compress.errors import InputError
from compress.layerwise.dense_view import DenseView
from families import build
from support import CALIBRATE, TEXT, dense_meaning, kl, load, logits, ready_inputs, run, step_of, tiny_llama


@pytest.mark.parametrize(("scheme", "most"), [
    ("w2a16g32", 0.4), ("w3a16g32-asym", 0.7),
    pytest.param("w4a16g32", 0.6, marks=pytest.mark.slow), pytest.param("w3a16g32", 0.5, marks=pytest.mark.slow),
])  # fmt: skip
def test_is_far_better_than_rounding_to_nearest_on_trained_weights(
    scheme: str, most: float, demo_model: Path, tmp_path: Path
) -> None:
    run(demo_model, tmp_path / "rtn", f"quantize.rtn(scheme={scheme})")
    run(demo_model, tmp_path / "gptq", f"{CALIBRATE} | quantize.gptq(scheme={scheme})")
    assert kl(demo_model, tmp_path / "gptq") < most * kl(demo_model, tmp_path / "rtn")


def test_every_option_earns_its_place(demo_model: Path, tmp_path: Path) -> None:
    """At 2 bits, where they matter most: without it, the outputs change more."""
    errors = {}
    for name, options in {"all": "", "clip": ", clip=none", "signed": ", signed=false", "sweeps": ", sweeps=0"}.items():
        result = run(demo_model, tmp_path / name, f"{CALIBRATE} | quantize.gptq(scheme=w2a16g32{options})")
        errors[name] = sum(record.output_error or 0 for record in result.manifest.weights.values())
    assert errors["all"] < min(errors["clip"], errors["signed"], errors["sweeps"])


def test_recorded_errors_are_those_of_what_is_on_disk(demo_model: Path, tmp_path: Path) -> None:
    run(demo_model, tmp_path / "out", f"{CALIBRATE} | quantize.gptq(scheme=w3a16g32)")
    source, out = DenseView(open_checkpoint(demo_model)), DenseView(open_checkpoint(tmp_path / "out"))
    assert out.checkpoint.manifest is not None
    for name, record in out.checkpoint.manifest.weights.items():
        w, q = source.dense(name).float(), out.qtensor(name)
        assert q is not None
        assert float((w - q.dequantize()).norm() / w.norm()) == pytest.approx(record.error, rel=1e-4)


@pytest.mark.parametrize("options", ["", ", order=stored", ", signed=false"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16g32", "w4a16"])
def test_readers_load_it_with_the_logits_of_its_dense_view(scheme: str, options: str, tiny: Path, tmp_path: Path) -> None:
    """Scales of either sign included."""
    calibrate = f"calibrate(data='{ready_inputs()}', samples=6)"
    run(tiny, tmp_path / "out", f"{calibrate} | quantize.gptq(scheme={scheme}{options}) | pack(format=compressed-tensors)")
    wanted = logits(load(dense_meaning(step_of(tmp_path / "out", "quantize.gptq"), tmp_path / "dense")))
    assert torch.equal(logits(load(tmp_path / "out")), wanted)


def test_starved_experts_are_rounded_and_counted(tmp_path: Path) -> None:
    """Experts that see too few tokens, or none, come out finite, and the manifest names them."""
    calibrate = f"calibrate(data='{ready_inputs(1)}', samples=1)"
    result = run(build("mixtral", tmp_path), tmp_path / "out", f"{calibrate} | quantize.gptq(scheme=w4a16g32, min_tokens=12)")
    (note,) = [note for note in result.manifest.notes if note.what == "fallback"]
    assert all("experts" in name for name in note.names)
    assert 0 < note.count < 24
    assert "fewer than 12 calibration tokens" in note.reason
    assert result.manifest.coverage["transformed"] == 32
    assert torch.isfinite(logits(load(dense_meaning(tmp_path / "out", tmp_path / "dense")))).all()


def test_a_hessian_that_does_not_factor_is_damped_more_and_counted(tiny: Path, tmp_path: Path) -> None:
    """One repeated token gives a Hessian of rank one."""
    save_file({"input_ids": torch.full((2, 32), 7)}, tmp_path / "one.safetensors")
    recipe = f"calibrate(data='{tmp_path / 'one.safetensors'}', samples=2) | quantize.gptq(scheme=w4a16g32, damping=1e-9)"
    notes = run(tiny, tmp_path / "out", recipe).manifest.notes
    assert [note.reason for note in notes if note.what == "damping"] == ["a Hessian that needed more damping than 1e-09"]


def test_activations_that_are_not_finite_are_an_error_that_names_the_weight(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "big")
    tensors = {ref: open_checkpoint(source).read(ref) for ref in open_checkpoint(source).refs}
    for part in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{part}_proj.weight"][:] *= 1e30
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"down_proj.*\n.*finite activations"):
        run(source, tmp_path / "out", f"calibrate(data='{ready_inputs()}', samples=6) | quantize.gptq(scheme=w4a16g32)")
    assert not (tmp_path / "out").exists()


def test_the_same_texts_by_another_path_are_the_same_step(demo_model: Path, tmp_path: Path) -> None:
    first = run(demo_model, tmp_path / "out", CALIBRATE)
    (tmp_path / "calibration.jsonl").write_bytes((TEXT / "calibration.jsonl").read_bytes())
    again = run(demo_model, tmp_path / "other", CALIBRATE.replace(str(TEXT), str(tmp_path)))
    assert first.manifest.fingerprint == again.manifest.fingerprint
    assert str(TEXT) not in first.manifest.to_text()
    assert run(demo_model, tmp_path / "out", CALIBRATE).fresh is False
