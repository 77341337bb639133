"""narrow: on disk no bytes for columns that are not there; read by the page alone, loaded bit for bit, refused when cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.evaluate.verify import verify_bytes
from compress.kernels.dispatch import load_format
from compress.kernels.native import narrow
from compress.kernels.native.packed import pack
from compress.layerwise.dense_view import DenseView
from compress.numerics import qtensor
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight
from support import each_is_refused, load, logits, page, run, tiny_llama

SIZES: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 320}
RECIPE = "quantize.rtn(scheme={}) | pack(format=native)"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("text", ["w4a16g64", "w4a16g32-asym", "w3a16g64", "w3a16", "w2a16g64-asym", "w8a16g32", "nf4g64", "fp8", "mxfp4", "nvfp4"])  # fmt: skip
@pytest.mark.parametrize("shape", [(40, 576), (3, 33, 320), (16, 260), (5, 384)])
def test_what_is_cut_comes_back_bit_for_bit(text: str, shape: tuple[int, ...]) -> None:
    scheme = Scheme.parse(text)
    if scheme.group is not None and shape[-1] % scheme.group:
        pytest.skip("the group does not divide the columns")
    weight = Weight("w", "BF16", shape, "linear" if len(shape) == 2 else "expert")
    state, fmt = State(scheme), load_format("native")()
    q = nearest(torch.randn(shape).bfloat16(), scheme, torch.bfloat16).q
    tensors = fmt.encode(weight, q)
    specs = fmt.specs(weight, state)
    assert {s.name: (s.shape, s.nbytes) for s in specs} == {n: (tuple(t.shape), t.nbytes) for n, t in tensors.items()}
    rest = narrow.rest(shape[-1], scheme.bits)
    assert ("w.rest" in tensors) == bool(rest)
    parts = {name.removeprefix("w."): tensor for name, tensor in tensors.items()}
    wide, canonical = pack(q), qtensor.encode(weight, q)
    back = narrow.whole(parts, scheme, shape[-1])
    assert back.keys() == wide.keys()
    assert all(_bytes(back[name]) == _bytes(wide[name]) for name in wide)
    decoded = qtensor.encode(weight, fmt.decode(weight, state, tensors))
    assert all(_bytes(decoded[name]) == _bytes(canonical[name]) for name in canonical)
    if rest and not shape[-2] % 16:
        # As many bytes as the codes themselves and their scales.
        assert sum(s.nbytes for s in specs) == sum(s.nbytes for s in qtensor.specs(weight, state))


@pytest.mark.parametrize("scheme", ["w4a16g64", "w3a16g64-asym", "w2a16g64", "w8a16g64-asym"])
def test_a_stranger_reads_it_with_the_page_alone(scheme: str, tmp_path: Path) -> None:
    run(tiny_llama(tmp_path / "model", **SIZES), tmp_path / "out", RECIPE.format(scheme))
    artifact, reader, name = open_checkpoint(tmp_path / "out"), page(), "model.layers.1.mlp.down_proj.weight"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["version"] == (1 if scheme == "w8a16g64-asym" else 3)
    parts = {
        part: artifact.read(f"{name}.{part}") for part in ("tiles", "rest", "scale", "zero") if f"{name}.{part}" in artifact.refs
    }
    plain = {part: (tensor.float() if part == "scale" else tensor).numpy() for part, tensor in parts.items()}
    found = reader["integers"](
        reader["entry_of"](config, name), plain["tiles"], plain["scale"], plain.get("zero"), rest=plain.get("rest")
    )
    assert torch.equal(torch.from_numpy(found), DenseView(artifact, rounded=False).dense(name))


def test_it_runs_as_an_artifact_of_the_first_version_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole chunks, as they were written before, and are read still; with the manifest and by config.json alone."""
    source = tiny_llama(tmp_path / "model", **SIZES)
    with monkeypatch.context() as patched:
        patched.setattr(narrow, "rest", lambda columns, bits: 0)
        run(source, tmp_path / "old", RECIPE.format("w4a16g64"))
    result = run(source, tmp_path / "new", RECIPE.format("w4a16g64"))
    old, new = open_checkpoint(tmp_path / "old"), open_checkpoint(tmp_path / "new")
    assert [c.config["quantization_config"]["version"] for c in (old, new)] == [1, 3]
    assert new.nbytes < old.nbytes
    (note,) = {note.reason for note in result.manifest.notes if note.what == "padded" and "192 columns" in note.reason}
    assert note == "192 columns fill 256, in chunks of 128: 4.25 bits on disk, 5.67 in memory, 4.25 without padding"
    for manifest in (True, False):
        for out in ("old", "new"):
            if not manifest:
                (tmp_path / out / "manifest.json").unlink()
            assert verify_bytes(open_checkpoint(tmp_path / out), Context()).decoded == 14
        first, second = (compress.load(tmp_path / out, "float32") for out in ("old", "new"))
        assert torch.equal(logits(first), logits(second))
        a, b = (dict(model.named_buffers()) for model in (first, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), "in memory both are the same"
    assert torch.equal(logits(second), logits(load(tmp_path / "new", dtype=torch.float32)))


@pytest.mark.parametrize("told", [True, False])
def test_what_was_cut_or_taken_away_is_an_error(told: bool, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "model.layers.0.mlp.down_proj.weight"
    run(tiny_llama(tmp_path / "model", **SIZES), out, RECIPE.format("w4a16g64"))
    whole, manifest = load_file(out / "model.safetensors"), Manifest.read(out)
    assert manifest is not None
    (out / "manifest.json").unlink()
    cut = {
        "fewer bytes": {f"{name}.rest": whole[f"{name}.rest"][:, :-4].contiguous()},
        "fewer rows": {f"{name}.rest": whole[f"{name}.rest"][:-1].clone()},
        "no rest": {f"{name}.rest": None},
        "no tiles": {f"{name}.tiles": None},
        "fewer chunks": {f"{name}.tiles": whole[f"{name}.tiles"][:, :-1].contiguous()},
        "fewer scales": {f"{name}.scale": whole[f"{name}.scale"][:, :-1].contiguous()},
    }
    each_is_refused(cut, whole, out, name, manifest if told else None)
