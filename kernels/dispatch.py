"""Dispatch: which formats there are, found by path."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.contract import Format


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Names of the formats, `compressed-tensors` for the folder `compressed_tensors`; nothing is imported."""
    folder = Path(__file__).parent
    return tuple(sorted(path.parent.name.replace("_", "-") for path in folder.glob("*/layout.py")))


def load_format(name: str) -> type[Format]:
    """The Format class of one folder."""
    from compress.contract import Format

    module = importlib.import_module(f"compress.kernels.{name.replace('-', '_')}.layout")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Format)]
    return next(cls for cls in found if cls.name == name)
