"""Atomic: replaces a small file by one rename."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from compress.errors import MachineError


def write_text(path: Path, text: str) -> Path:
    """Writes a file, and waits until it is on disk; returns `path`. Raises MachineError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(draft, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise MachineError(str(path), "a place to write", error.strerror or str(error), "make room, or write elsewhere") from None
    return path
