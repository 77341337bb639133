"""Fixtures: the embedded trained model, and a tiny Llama made on the spot."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish() -> None:
    """What modules and the tests themselves have made stays: Python's search for cycles need not look through it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries that count what they have left at the end are not told of a leak."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def nobody_waits_for_the_disk() -> Iterator[None]:
    """What tests write need not outlive a power cut. That fsync is asked for is seen by test_writer.py and test_power_cut.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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


@pytest.fixture(scope="session")
def forks() -> Iterator[dict[str, Any]]:
    """The processes that readers are forked from, by what they run; one of each is made when it is first needed."""
    from warm_readers import end

    made: dict[str, Any] = {}
    yield made
    end(made)


@pytest.fixture
def warm(forks: dict[str, Any]) -> Iterator[None]:
    """Readers of `verify` are forked from processes that have their libraries behind them."""
    from warm_readers import warm

    with warm(forks):
        yield
