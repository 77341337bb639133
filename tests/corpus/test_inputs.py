"""Ready inputs: taken as they are, drawn by the seed, and checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.corpus import build
from compress.errors import InputError
from corpus.oracle import said, sha256, slow_order, spec


def features(path: Path, count: int = 12, start: int = 0, **more: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(start)
    tensors = {
        "input_features": torch.randn(count, 4, 10, generator=generator).bfloat16(),
        "decoder_input_ids": torch.arange(start, start + count * 3, dtype=torch.int32).reshape(count, 3) % 100,
        "weight": torch.rand(count, generator=generator),
    }
    save_file(tensors | more, path)
    return path


def test_ready_inputs_are_taken_as_they_are(demo_model: Path, tmp_path: Path) -> None:
    one, other = features(tmp_path / "a.safetensors"), features(tmp_path / "b.safetensors", 9, 50)
    whole = [load_file(one), load_file(other)]
    # No tokenizer is needed, and `length` is not theirs.
    corpus = build(spec(one, other, samples=10, weights=(3, 2), length=2048), tmp_path / "none", 7, vocabulary=100, positions=3)
    orders = [slow_order(n, f"7/{sha256(p.read_bytes())}") for n, p in ((12, one), (9, other))]
    last = slow_order(10, "7/order")
    for name, tensor in corpus.tensors.items():
        drawn = torch.cat([whole[0][name][orders[0][:6]], whole[1][name][orders[1][:4]]])
        assert tensor.dtype == whole[0][name].dtype
        assert torch.equal(tensor, drawn[last])
    assert [(s.name, s.samples, s.documents, s.total) for s in corpus.sources] == [
        ("a.safetensors", 6, 6, 12),
        ("b.safetensors", 4, 4, 9),
    ]
    assert corpus.sources[0].sha256 == sha256(one.read_bytes())
    assert build(spec(one, other, samples=10, weights=(3, 2)), tmp_path, 7).digest == corpus.digest
    assert build(spec(one, other, samples=10, weights=(3, 2)), tmp_path, 8).digest != corpus.digest


def test_ready_inputs_are_checked(tmp_path: Path) -> None:
    path, other = features(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"

    def tried(*data: Path, **limits: int) -> str:
        return said(lambda: build(spec(*data), tmp_path, 0, **limits))

    assert "expected: 6 samples" in tried(features(other, 5))
    assert "it has 5" in tried(features(other, 5))
    assert "equally many" in tried(features(other, weight=torch.zeros(5)))
    assert "equally many" in tried(features(other, weight=torch.zeros(())))
    assert "'weight' of shape [12, 0]" in tried(features(other, weight=torch.zeros(12, 0)))
    assert "NaN or Inf" in tried(features(other, weight=torch.full((12,), torch.nan)))
    assert "NaN or Inf" in tried(features(other, weight=torch.full((12,), torch.nan).to(torch.float8_e4m3fn)))
    assert "the inputs of" in tried(path, features(other, more=torch.zeros(12)))
    assert "the inputs of" in tried(path, features(other, weight=torch.zeros(12).double()))
    shutil.copy(path, other)
    assert f"those of {path}" in tried(path, other)
    assert "ids from 0 to 9" in tried(path, vocabulary=10)
    most = int(load_file(other)["decoder_input_ids"].max())
    assert build(spec(path, samples=12), tmp_path, 0, vocabulary=most + 1)
    assert str(most) in said(lambda: build(spec(path, samples=12), tmp_path, 0, vocabulary=most))
    assert "at most 2 tokens" in tried(path, positions=2)
    assert "-100" in tried(features(other, input_ids=torch.full((12, 2), -100)))
    save_file({}, other)
    assert "no tensor" in tried(other)
    other.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="header"):
        build(spec(other), tmp_path, 0)
