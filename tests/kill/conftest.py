"""The server of the kill suite, and the table that it ends with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

TABLE: list[tuple[str, ...]] = []
HEAD = ("what is killed", "phase", "kills", "resumed", "redone at most", "differences")


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    from harness import Server

    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="session")
def table() -> list[tuple[str, ...]]:
    """Rows for the end of the run."""
    return TABLE


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TABLE:
        return
    rows = [HEAD, *TABLE]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    terminalreporter.section("kills")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
