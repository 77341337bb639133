"""Cache: the folder for files that can be rebuilt: COMPRESS_CACHE, or the user's."""

from __future__ import annotations

import os
from pathlib import Path


def folder_of(part: str) -> Path:
    """The folder of one kind of thing; it need not exist."""
    if chosen := os.environ.get("COMPRESS_CACHE"):
        return Path(chosen).expanduser().absolute() / part
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "compress" / part
