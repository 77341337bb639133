"""A tiny model and its packed artifact, for tests that time them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import run, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("timed") / "model")


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    run(model, model.parent / "out", "quantize.rtn(scheme=w4a16g32) | pack(format=native)")
    return model.parent / "out"
