"""Memory is bounded by a tensor per worker: a wide model stays below its plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks.stream import OURS, measure, synthetic


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 6])
def test_peak_memory_is_planned_and_does_not_grow_with_the_model(layers: int, tmp_path: Path) -> None:
    source = synthetic(tmp_path / "source", layers)
    found = measure(sys.executable, OURS, source, tmp_path / "out")
    assert found["peak"] < 750_000_000
    assert found["peak"] <= found["planned_peak"]
