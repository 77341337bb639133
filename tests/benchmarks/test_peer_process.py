"""A peer's process: AutoRound's blocks are kept, and a process that goes on after another one makes what one process makes."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from benchmarks.real.peer_process import keep_blocks


class Composer:
    """Stands for AutoRound's: what it makes of a block hangs on every generator and on both streams."""

    dies_at = -1

    def compress_block(self, block, fp_inputs, input_others, block_ctx, q_inputs=None, input_ids=None):  # type: ignore[no-untyped-def]
        if block_ctx.block_index == self.dies_at:
            raise KeyboardInterrupt
        noise = random.random() + numpy.random.rand() + torch.rand(())
        with torch.no_grad():
            quantized = block(fp_inputs if q_inputs is None else q_inputs)
            dense = block(fp_inputs)
            block.weight.copy_((block.weight + noise).round())
            block.scale = noise
        return quantized, dense


def tuned(folder: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int = -1) -> tuple[list[torch.nn.Linear], dict[str, float]]:
    """Five blocks, as AutoRound's loop goes through them, by a process that knows of none before it."""
    composer = type("AlgorithmComposer", (Composer,), {"dies_at": dies_at})
    module = ModuleType("auto_round.algorithms.composer")
    module.AlgorithmComposer = composer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "auto_round", ModuleType("auto_round"))
    monkeypatch.setitem(sys.modules, "auto_round.algorithms", ModuleType("auto_round.algorithms"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = keep_blocks(folder)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    blocks = [torch.nn.Linear(4, 4) for _ in range(5)]
    dense, quantized = torch.ones(2, 4), None
    for index, block in enumerate(blocks):
        quantized, dense = composer().compress_block(
            block, dense, {}, block_ctx=SimpleNamespace(block_index=index), q_inputs=quantized, input_ids=None
        )
    return blocks, before


@pytest.mark.parametrize("dies_at", [0, 1, 3, 4])
def test_a_process_that_goes_on_makes_what_one_process_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    whole, before = tuned(tmp_path / "whole", monkeypatch)
    assert before == {"blocks": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "parts", monkeypatch, dies_at)
    again, before = tuned(tmp_path / "parts", monkeypatch)
    assert before["blocks"] == dies_at
    assert (before["seconds"] > 0) == (dies_at > 0)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.scale, other.scale)
    assert len({float(block.scale) for block in whole}) == 5
