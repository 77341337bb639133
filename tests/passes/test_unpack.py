"""unpack: what was packed comes back as it was, by us or by another tool, and a recipe goes on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, CoverageError, FormatError, RecipeError
from compress.evaluate.perplexity_kl import compare
from compress.kernels.dispatch import formats, load_format
from compress.layerwise.dense_view import DenseView
from compress.numerics import masks
from compress.numerics.qtensor import along_inputs
from families import build
from support import dense_meaning, load, logits, ready_inputs, run, step_of

_AT_LOAD = ", dequantize=true"
CODED = [form for form in formats() if not load_format(form).expands and not load_format(form).renames]
"""Formats that hold codes beside tensors under their own names; for the other one see tests/kernels/test_gguf.py."""


def quantize(scheme: str, form: str) -> str:
    """A step whose zero points the format can say."""
    least = load_format(form).least_zero if scheme.endswith("-asym") else 0
    return f"quantize.rtn(scheme={scheme}, least_zero={least})"


def pack(scheme: str, form: str) -> str:
    return f"pack(format={form}{_AT_LOAD if form == 'compressed-tensors' and scheme.endswith('-asym') else ''})"


def stored(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory, whatever file it is in: dtype, shape, bytes."""
    checkpoint = open_checkpoint(directory)
    return {n: (r.dtype, tuple(r.shape), b"".join(map(bytes, checkpoint.chunks(n)))) for n, r in checkpoint.refs.items()}


def as_another_tools(artifact: Path, target: Path) -> Path:
    """A copy without the manifest: nothing says that it is ours."""
    shutil.copytree(artifact, target)
    (target / "manifest.json").unlink()
    return target


def codes(directory: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """Codes, scale and zero point (spread out where the scheme has but the middle) of every packed weight."""
    dense_view, found = DenseView(open_checkpoint(directory)), {}
    for name in dense_view.weights:
        q = dense_view.qtensor(name)
        assert q is not None
        found[name] = (
            q.codes,
            q.scale,
            torch.full(q.scale.shape, q.scheme.middle, dtype=torch.uint8) if q.zero is None else q.zero,
        )
    assert found
    return found


def same_codes(one: Path, other: Path) -> None:
    a, b = codes(one), codes(other)
    assert set(a) == set(b)
    for name in a:
        for mine, theirs in zip(a[name], b[name], strict=True):
            assert mine.dtype == theirs.dtype, name
            assert torch.equal(mine, theirs), name


CASES = [(form, scheme) for form in CODED for scheme in ("w4a16g32", "w4a16g32-min" if form == "mlx" else "w4a16-asym")]
CASES += [
    ("gptq", "w2a16g32-asym"),
    ("gptq", "w3a16g32"),
    ("compressed-tensors", "w3a16g32-asym"),
    ("compressed-tensors", "w8a16g32"),
]


@pytest.mark.parametrize(("form", "scheme"), CASES)
def test_what_was_packed_comes_back_byte_by_byte(tiny: Path, tmp_path: Path, form: str, scheme: str) -> None:
    artifact = tmp_path / "artifact"
    run(tiny, artifact, f"{quantize(scheme, form)} | {pack(scheme, form)}")
    canonical = step_of(artifact, "quantize.rtn")
    run(artifact, tmp_path / "unpacked", "unpack")
    assert stored(tmp_path / "unpacked") == stored(canonical)
    config = json.loads((tmp_path / "unpacked" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compress"
    assert not (tmp_path / "unpacked" / "quantize_config.json").exists()
    run(artifact, tmp_path / "again", f"unpack | {pack(scheme, form)}")
    assert stored(tmp_path / "again") == stored(artifact)
    # Nothing but the manifest knew that it is ours.
    run(as_another_tools(artifact, tmp_path / "foreign"), tmp_path / "taken", "unpack")
    same_codes(tmp_path / "taken", canonical)


@pytest.mark.parametrize("form", CODED)
def test_experts_come_back(tmp_path: Path, form: str) -> None:
    run(build("mixtral", tmp_path), tmp_path / "artifact", f"quantize.rtn(scheme=w4a16g32) | pack(format={form})")
    run(tmp_path / "artifact", tmp_path / "unpacked", "unpack")
    assert stored(tmp_path / "unpacked") == stored(step_of(tmp_path / "artifact", "quantize.rtn"))


@pytest.mark.parametrize("form", CODED)
def test_masks_come_back(tiny: Path, tmp_path: Path, form: str) -> None:
    recipe = f"prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w4a16g32) | pack(format={form})"
    run(tiny, tmp_path / "artifact", recipe)
    run(tmp_path / "artifact", tmp_path / "unpacked", "unpack")
    assert stored(tmp_path / "unpacked") == stored(step_of(tmp_path / "artifact", "quantize.rtn"))
    dense_view = DenseView(open_checkpoint(tmp_path / "unpacked"))
    assert len(dense_view.weights) == 14
    for name, (weight, state) in dense_view.weights.items():
        assert str(state) == "codes(w4a16g32)+masked(2:4)"
        q = dense_view.qtensor(name)
        assert q is not None
        assert state.sparsity is not None
        assert masks.holds(along_inputs(weight, q.nonzero()), state.sparsity), name
    run(tmp_path / "artifact", tmp_path / "dense", "unpack(to=dense)")
    states = {name: str(entry.state) for name, entry in open_checkpoint(tmp_path / "dense").logical.items()}
    assert {states[name] for name in dense_view.weights} == {"masked(2:4)"}


@pytest.mark.parametrize("form", CODED)
def test_dense_is_what_codes_mean_and_can_be_quantized_again(tiny: Path, tmp_path: Path, form: str) -> None:
    scheme = "w4a16g32-min" if form == "mlx" else "w4a16g32-asym"
    run(tiny, tmp_path / "artifact", f"{quantize(scheme, form)} | {pack(scheme, form)}")
    run(tmp_path / "artifact", tmp_path / "dense", "unpack(to=dense)")
    meant = dense_meaning(step_of(tmp_path / "artifact", "quantize.rtn"), tmp_path / "meant")
    assert stored(tmp_path / "dense") == stored(meant)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not (tmp_path / "dense" / "quantize_config.json").exists()
    assert torch.equal(logits(load(tmp_path / "dense")), logits(load(meant)))
    run(tmp_path / "dense", tmp_path / "later", "quantize.rtn(scheme=w8a16g32) | pack")
    run(tmp_path / "artifact", tmp_path / "at-once", "unpack(to=dense) | quantize.rtn(scheme=w8a16g32) | pack")
    assert stored(tmp_path / "later") == stored(tmp_path / "at-once")


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "as another tool's"])
@pytest.mark.parametrize(
    ("here", "there", "scheme"),
    [
        ("gptq", "compressed-tensors", "w3a16g32-asym"),
        ("gptq", "awq", "w4a16g32"),
        ("awq", "compressed-tensors", "w4a16g32-asym"),
    ],
)
def test_going_over_to_another_format_and_back_changes_nothing(
    tiny: Path, tmp_path: Path, here: str, there: str, scheme: str, foreign: bool
) -> None:
    run(tiny, tmp_path / "first", f"{quantize(scheme, here)} | {pack(scheme, here)}")
    source = as_another_tools(tmp_path / "first", tmp_path / "foreign") if foreign else tmp_path / "first"
    run(source, tmp_path / "second", f"unpack | {pack(scheme, there)}")
    same_codes(tmp_path / "second", tmp_path / "first")
    assert (tmp_path / "second" / "quantize_config.json").exists() == (there == "gptq")
    source = as_another_tools(tmp_path / "second", tmp_path / "foreign2") if foreign else tmp_path / "second"
    run(source, tmp_path / "third", f"unpack | {pack(scheme, here)}")
    assert stored(tmp_path / "third") == stored(tmp_path / "first")
    configs = [json.loads((tmp_path / at / "config.json").read_text()) for at in ("first", "third")]
    assert configs[0] == configs[1]


def test_zero_points_that_gptq_cannot_say_are_refused(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].abs() + 0.01
    shutil.copytree(tiny, tmp_path / "positive")
    save_file(tensors, tmp_path / "positive" / "model.safetensors", {"format": "pt"})
    run(tmp_path / "positive", tmp_path / "artifact", "quantize.rtn(scheme=w4a16g32-asym) | pack(format=awq)")
    with pytest.raises(FormatError, match=name) as caught:
        run(tmp_path / "artifact", tmp_path / "out", "unpack | pack(format=gptq)")
    assert "zero points from 1 on" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unpack_where_there_is_nothing_to_unpack(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "artifact", "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)")
    run(tmp_path / "artifact", tmp_path / "unpacked", "unpack")
    wrong: list[tuple[Path, str, type[CompressError], str]] = [
        (tiny, "unpack", RecipeError, "a checkpoint with nothing to unpack"),
        (tmp_path / "unpacked", "unpack", RecipeError, "a checkpoint with nothing to unpack"),
        (tiny, "quantize.rtn(scheme=w4a16g32) | unpack", RecipeError, "unpack as the first pass"),
        (tmp_path / "artifact", "unpack | unpack", RecipeError, "unpack as the first pass"),
        (tmp_path / "artifact", "unpack | pack | unpack", RecipeError, "pack"),
        (tmp_path / "artifact", "unpack | quantize.rtn(scheme=w8a16g32)", CoverageError, "already codes"),
        (tmp_path / "artifact", "unpack(to=dense) | pack", FormatError, "nothing is quantized"),
    ]
    for source, recipe, error, said in wrong:
        with pytest.raises(error, match=said):
            run(source, tmp_path / "out", recipe)
        assert not (tmp_path / "out").exists(), recipe
    with pytest.raises(CompressError) as caught:
        run(tmp_path / "artifact", tmp_path / "out", "quantize.rtn(scheme=w8a16g32)")
    assert "unpack" in str(caught.value), "a packed source without unpack: the message says what to do"


@pytest.mark.parametrize("form", CODED)
def test_another_tools_artifact_is_measured_as_ours(tiny: Path, tmp_path: Path, form: str) -> None:
    run(tiny, tmp_path / "artifact", f"quantize.rtn(scheme=w4a16g32) | pack(format={form})")
    foreign = as_another_tools(tmp_path / "artifact", tmp_path / "foreign")
    windows = load_file(ready_inputs())["input_ids"]
    found = [compare(open_checkpoint(tiny), open_checkpoint(at), windows) for at in (tmp_path / "artifact", foreign)]
    assert found[0] == found[1]
    assert found[0].kl.value > 0
    assert compare(open_checkpoint(tmp_path / "artifact"), open_checkpoint(foreign), windows).kl.value == 0


@pytest.mark.parametrize(("bits", "strategy"), [(4, {"strategy": "group", "group_size": 32}), (8, {"strategy": "channel"})])
def test_what_compressed_tensors_itself_has_written(tiny: Path, tmp_path: Path, bits: int, strategy: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    terms = {"num_bits": bits, "type": "int", "symmetric": True, **strategy}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**terms))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = {}
    for name, tensor in load_file(tiny / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        groups = tensor.unflatten(-1, (-1, strategy.get("group_size", tensor.shape[-1])))
        scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).to(tensor.dtype)
        parts = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
    shutil.copytree(tiny, tmp_path / "theirs")
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "weights": terms, "input_activations": None, "output_activations": None}
    said = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    expected = logits(load(tmp_path / "theirs"))
    run(tmp_path / "theirs", tmp_path / "ours", "unpack | pack")
    same_codes(tmp_path / "ours", tmp_path / "theirs")
    assert torch.equal(logits(load(tmp_path / "ours")), expected)
    run(tmp_path / "theirs", tmp_path / "gptq", "unpack | pack(format=gptq)")
    same_codes(tmp_path / "gptq", tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path / "dense", "unpack(to=dense)")
    assert torch.equal(logits(load(tmp_path / "dense")), expected)
