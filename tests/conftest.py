"""Fixtures: the embedded trained model, and a tiny Llama made on the spot."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where transformers copies a model's own Python before it runs it: not into the cache of whoever runs the tests."""
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="session", autouse=True)
def wide_terminal() -> None:
    """Lines are as wide as they are, whatever terminal the tests run in; a test of narrow ones says so itself."""
    os.environ["COLUMNS"] = "400"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained model that the package ships."""
    import compress.demo

    return Path(compress.demo.__file__).parent / "model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks in bf16 with random weights; do not write into it."""
    from support import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
