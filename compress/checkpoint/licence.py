"""Licence: what the head of a model's README.md says that its licence is."""

from __future__ import annotations

import re
from pathlib import Path

_HEAD_BYTES = 1 << 16
_LICENCE = re.compile(r"""^license:[ \t]*["']?([A-Za-z0-9][\w.+-]{0,63})["']?[ \t]*$""", re.ASCII | re.MULTILINE)


def licence_of(readme: Path) -> str:
    """The licence in the head of a README; empty if it names none, or is not there."""
    if not readme.is_file():
        return ""
    with open(readme, "rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8", "replace")
    parts = re.split(r"^---[ \t]*\r?$", head, maxsplit=2, flags=re.MULTILINE)
    found = _LICENCE.search(parts[1].replace("\r", "")) if len(parts) == 3 and not parts[0].strip() else None
    return found[1] if found else ""
