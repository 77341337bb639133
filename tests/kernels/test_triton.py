"""The triton backend: what it refuses, how experts become blocks, and all of interpreted.py in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.errors import Refusal
from compress.kernels.cuda import device
from compress.kernels.cuda.cubins import Capability
from compress.kernels.dispatch import Work, load_backend
from compress.kernels.native.blocks import block_map
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State

WORK = Work(State(Scheme.parse("w4a16g128")), 256, 512, torch.bfloat16, torch.bfloat16, "cuda")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_numbers_under_the_interpreter(which: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(tests)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("counts", [(0,), (5,), (0, 0, 0), (16, 16), (17, 0, 1, 40), (1,) * 9, (0, 100, 0)])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_blocks_are_the_rows_of_experts(counts: tuple[int, ...], block: int) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    total = sum(counts)
    wanted = []
    for expert, count in enumerate(counts):
        start = int(offsets[expert])
        wanted += [(expert, start + at, min(block, count - at)) for at in range(0, count, block)]
    found = block_map(offsets, total, block)
    assert found.dtype == torch.int32
    assert found.shape == (3, min(total, len(counts) + total // block))
    assert [tuple(column) for column in found.T.tolist() if column[2]] == wanted
    assert (found[0] >= 0).all()
    assert (found[0] < len(counts)).all()
    compiled = torch.compile(block_map, fullgraph=True, backend="eager")
    assert torch.equal(compiled(offsets, total, block), found)


@pytest.mark.parametrize(("work", "capability", "said"), [
    (WORK, (7, 5), "without tensor cores on compute capability 7.5"),
    (replace(WORK, dtype=torch.float32), (9, 0), "activations are float32"),
    (replace(WORK, turned=True), (9, 0), "Conv1D"),
    (replace(WORK, state=State(Scheme.parse("nf3g32"))), (9, 0), "table of 8 values"),
])  # fmt: skip
def test_refusals(work: Work, capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(device, "usable", lambda kind: Capability(*capability))
    with pytest.raises(Refusal, match=said) as refusal:
        load_backend("triton").refuse(work)
    assert refusal.value.do


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = load_backend("triton")
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(Refusal, match=r"^the weight lies on cpu$"):
            backend.refuse(replace(WORK, device="cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match="triton is not installed"):
        backend.refuse(WORK)
