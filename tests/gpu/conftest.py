"""Every test here is marked gpu, is skipped without one, and tells what became of it as it goes.

COMPRESS_GPU_PART=I/N takes each N-th test from the I-th on; COMPRESS_GPU_LOG names a file that gets a JSON line for every test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def tell(**event: Any) -> None:
    """Appends a line to the log."""
    if log := os.environ.get("COMPRESS_GPU_LOG"):
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(event, ensure_ascii=False) + "\n")


# First, so that tests have their mark before others choose by it.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    if not ours:
        return
    import torch

    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if os.environ.get("COMPRESS_TEST_DEVICE", "cuda") == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))
    if part := os.environ.get("COMPRESS_GPU_PART"):
        number, count = map(int, part.split("/"))
        kept = ours[number::count]
        items[:] = kept
    tell(collected=[item.nodeid for item in items])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        lines = told.strip().splitlines()
        # The line that says what was wrong, which pytest marks.
        why = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1] if lines else "")
        tell(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), why=why[:300])
