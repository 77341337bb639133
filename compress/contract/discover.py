"""Discover: passes found by path; captions read without importing anything.

`passes/quantize/rtn.py` is the pass `quantize.rtn`. This is the one place that imports from a higher floor, and by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from compress.contract.pass_base import Pass

_CAPTION = re.compile(r'\s*"""(.+?)(?:\n|""")')


def _folder() -> Path:
    spec = importlib.util.find_spec("compress.passes")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("compress.passes", "an installed package", "none", "install with `pip install .` or -e .")
    return Path(next(iter(spec.submodule_search_locations)))


@lru_cache(maxsize=1)
def pass_files() -> dict[str, Path]:
    """Pass name -> its file, sorted by name."""
    folder = _folder()
    files = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in files}


def names_passes(text: str) -> bool:
    """Whether a text looks like a one-liner of passes, not like the name of a file."""
    return "|" in text or "(" in text or text.strip() in pass_files()


def caption(name: str) -> str:
    """The first line of a pass's file."""
    return caption_of(pass_files()[name])


def caption_of(path: Path) -> str:
    """The first line of a module's docstring, read as text."""
    with open(path, encoding="utf-8") as stream:
        match = _CAPTION.match(stream.read(400))
    return match[1].rstrip() if match else ""


@lru_cache
def load_pass(name: str) -> type[Pass]:
    """The one Pass class that a pass's file defines. Raises UsageError for an unknown name."""
    from compress.contract.pass_base import Pass

    if name not in pass_files():
        raise UsageError(
            f"pass '{name}'", f"one of {', '.join(pass_files())}", f"an unknown name{did_you_mean(name, pass_files())}"
        )
    module = importlib.import_module(f"compress.passes.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__file__} must define exactly one pass, not {len(found)}"
    if inspect.isabstract(found[0]):
        raise TypeError(f"{name} lacks {', '.join(sorted(found[0].__abstractmethods__))}; see compress/contract/shapes.py")
    return found[0]
