"""Spill: tensors set aside come back as they were, and a full disk is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.checkpoint import spill
from compress.errors import MachineError


def test_what_is_set_aside_comes_back(tmp_path: Path) -> None:
    there = spill.Spill(tmp_path / "aside")
    tensors = {
        "large": torch.randn(64, 512).T, "small": torch.randn(3), "mask": torch.rand(512, 512) > 0.5,
        "half": torch.randn(256, 256).bfloat16(), "wide": torch.ones(1).expand(70_000), "ids": torch.arange(20_000),
    }  # fmt: skip
    for key, tensor in tensors.items():
        there.put(key, tensor)
    for key, tensor in tensors.items():
        got = there.get(key)
        assert torch.equal(got, tensor)
        assert got.dtype == tensor.dtype
    there.add("large", torch.ones(512, 64))
    there.add("new", torch.ones(2))
    assert torch.equal(there.get("large"), tensors["large"] + 1)
    assert torch.equal(there.get("new"), torch.ones(2))
    files = len(list((tmp_path / "aside").iterdir()))
    there.drop("large")
    assert "large" not in there
    assert len(list((tmp_path / "aside").iterdir())) == files - 1
    there.close()
    assert not (tmp_path / "aside").exists()
    with pytest.raises(MachineError, match="bytes for hidden states"):
        there.put("late", tensors["large"])
