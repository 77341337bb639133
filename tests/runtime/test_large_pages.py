"""Weights of a packed model in memory of large pages: the same numbers, wherever a system has no such pages."""

from __future__ import annotations

import copy
import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import compress
from compress.kernels.cpu import large_pages
from compress.kernels.native.modules import PackedWeight
from compress.runtime.large_pages import into_large_pages
from decoding import packed, said


def weights(model: Any) -> list[torch.Tensor]:
    parts = [part for weight in model.modules() if isinstance(weight, PackedWeight) for part in weight.buffers() if part.numel()]
    return [*parts, model.lm_head.weight]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_weights_lie_behind_each_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = packed(name, tmp_path)
    small = compress.load(out, "bfloat16")
    monkeypatch.setattr(large_pages, "PAGE", 4096)
    large = compress.load(out, "bfloat16")
    assert torch.equal(said(small, 2), said(large, 2))
    found, meant = weights(large), weights(small)
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(found, meant, strict=True))
    starts = {part.data_ptr(): part.numel() * part.itemsize for part in found}
    assert max(starts) - min(starts) < sum(-(-size // 64) * 64 for size in starts.values())
    assert all(start % 64 == 0 for start in starts)
    assert all(part.untyped_storage().nbytes() == part.numel() * part.itemsize for part in found)
    tied = [one.lm_head.weight is one.get_input_embeddings().weight for one in (small, large)]
    assert tied[0] is tied[1]


def test_what_is_done_to_a_model_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "PAGE", 4096)
    model: Any = compress.load(packed("llama", tmp_path), "bfloat16")
    meant = said(model, 1)
    assert torch.equal(said(copy.deepcopy(model), 1), meant)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(said(compress.load(tmp_path / "saved", "bfloat16"), 1), meant)


def test_systems_without_large_pages_keep_the_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *given: int) -> None:
            raise OSError(22, "Invalid argument")

    model = compress.load(packed("llama", tmp_path), "bfloat16")
    before = [part.data_ptr() for part in weights(model)]
    monkeypatch.setattr(large_pages, "PAGE", 4096)
    for system in (SimpleNamespace(), SimpleNamespace(**{**vars(mmap), "mmap": Refusing})):
        monkeypatch.setattr(large_pages, "mmap", system)
        assert into_large_pages(model) == 0
    assert [part.data_ptr() for part in weights(model)] == before
