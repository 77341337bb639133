"""Models of the families, each made once for a file of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from families import build


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build(name, folder)
