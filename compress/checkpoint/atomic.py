"""Atomic: replaces a small file by one rename."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from compress.errors import MachineError


def write_text(path: Path, text: str) -> Path:
    """Writes a file, and waits until it is on disk; returns `path`. Raises MachineError."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes a file, and waits until it is on disk; returns `path`. Raises MachineError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(exist_ok=True)
        _sweep(path)
        with open(draft, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise MachineError(str(path), "a place to write", error.strerror or str(error), "make room, or write elsewhere") from None
    return path


def _sweep(path: Path) -> None:
    """Removes drafts of a file whose processes were killed."""
    for name in os.listdir(path.parent):
        number = name.removeprefix(f".{path.name}.").removesuffix(".draft")
        if name == f".{path.name}.{number}.draft" and number.isdecimal() and not _lives(int(number)):
            with suppress(OSError):
                path.with_name(name).unlink()


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
