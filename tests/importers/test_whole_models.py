"""Whole checkpoints: every tensor accounted for, every name at its place, equal to what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.architecture.weight_map import meta_model, place
from compress.checkpoint.reader import Checkpoint, Logical, open_checkpoint
from compress.importers import Foreign, open_foreign
from compress.layerwise.dense_view import DenseView
from compress.spec.weight_state import State
from families import build
from support import run, step_of


def changed(directory: Path, target: Path, quantization: dict[str, Any], pack: Any) -> Checkpoint:
    """A copy of a dense checkpoint whose tensors `pack(name, tensor)` replaces."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensors |= pack(name, tensor)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return open_checkpoint(target)


def at_their_places(checkpoint: Checkpoint, foreign: Foreign, names: set[str]) -> None:
    """What is left beside the parts, and the weights, are the names of the dense checkpoint and fit the model."""
    logical = {n: Logical(p.dtype, p.shape, State(p.scheme), False) for n, p in foreign.weights.items()}
    logical |= {n: Logical(r.dtype, r.shape, State(), False) for n, r in checkpoint.refs.items() if n not in foreign.parts}
    assert set(logical) == names
    resolved = place(checkpoint, logical, meta_model(checkpoint), allow_dtype_mismatch=True)
    assert not resolved.unused


def as_loaded(checkpoint: Checkpoint, foreign: Foreign, dense: Any, **options: Any) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16, **options).state_dict()
    for name, packed in foreign.weights.items():
        assert torch.equal(dense(checkpoint, packed), loaded[name]), name


def test_gpt_oss_in_mxfp4(tmp_path: Path, dense: Any) -> None:
    source = build("gpt_oss", tmp_path / "dense")
    generator = torch.Generator().manual_seed(0)

    def pack(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    checkpoint = changed(source, tmp_path / "mxfp4", {"quant_method": "mxfp4"}, pack)
    foreign = open_foreign(checkpoint)
    assert len(foreign.weights) == 4
    at_their_places(checkpoint, foreign, set(load_file(source / "model.safetensors")))
    as_loaded(checkpoint, foreign, dense)


def test_llama_in_fp8(tiny: Path, tmp_path: Path, dense: Any) -> None:
    def pack(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith("_proj.weight"):
            return {name: tensor}
        rows, columns = tensor.shape
        scale = torch.rand(rows // 32, columns // 32) * 0.01 + 0.001
        spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return {name: (tensor.float() / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    checkpoint = changed(tiny, tmp_path / "fp8", said, pack)
    foreign = open_foreign(checkpoint)
    assert len(foreign.weights) == 14
    at_their_places(checkpoint, foreign, set(load_file(tiny / "model.safetensors")))
    as_loaded(checkpoint, foreign, dense, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))


@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16g32-asym", "w8a16"])
def test_llama_in_what_we_pack_ourselves(tiny: Path, tmp_path: Path, dense: Any, scheme: str) -> None:
    """Codes come back as they went in, by a decoder that shares no code with the packer but the bit stream."""
    pytest.importorskip("compressed_tensors")
    options = "(dequantize=true)" if scheme.endswith("asym") else ""
    run(tiny, tmp_path / "out", f"quantize.rtn(scheme={scheme}) | pack{options}")
    checkpoint = open_checkpoint(tmp_path / "out")
    canonical = DenseView(open_checkpoint(step_of(tmp_path / "out", "quantize.rtn")))
    foreign = open_foreign(checkpoint)
    assert set(foreign.weights) == set(canonical.weights)
    for name, packed in foreign.weights.items():
        ours, theirs = canonical.qtensor(name), packed.read(checkpoint.read)
        assert str(packed.scheme) == scheme
        for part in ("codes", "scale", "zero"):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b), (name, part)
    at_their_places(checkpoint, foreign, set(load_file(tiny / "model.safetensors")))
    if scheme != "w3a16g32-asym":
        return
    as_loaded(checkpoint, foreign, dense)
