"""Dispatch: which formats there are, found by path."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InputError

if TYPE_CHECKING:
    from compress.contract import Format


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Names of the formats, `compressed-tensors` for the folder `compressed_tensors`; nothing is imported."""
    folder = Path(__file__).parent
    return tuple(sorted(path.parent.name.replace("_", "-") for path in folder.glob("*/layout.py")))


def load_format(name: str) -> type[Format]:
    """The Format class of one folder. Raises InputError for a name, of a manifest say, that is none."""
    from compress.contract import Format

    if name not in formats():
        raise InputError("format", f"one of {', '.join(formats())}", f"'{name}'", "take the version of compress that made it")
    module = importlib.import_module(f"compress.kernels.{name.replace('-', '_')}.layout")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Format)]
    return next(cls for cls in found if cls.name == name)
