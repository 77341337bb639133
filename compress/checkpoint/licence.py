"""Licence: what the head of a model's README.md says that its licence is."""

from __future__ import annotations

import re
from pathlib import Path

_HEAD_BYTES = 1 << 16
_LICENCE = re.compile(r"""^license:[ \t]*["']?([A-Za-z0-9][\w.+-]{0,63})["']?[ \t]*$""", re.ASCII | re.MULTILINE)
_DETAIL = re.compile(r"""^license_(name|link):[ \t]*["']?([^\s"'][^"'\n]{0,199}?)["']?[ \t]*$""", re.MULTILINE)


def licence_of(readme: Path) -> str:
    """The licence in the head of a README; empty if it names none, or is not there."""
    found = _LICENCE.search(_head(readme))
    return found[1] if found else ""


def licence_details(readme: Path) -> dict[str, str]:
    """`name` and `link` of a licence that the Hub has no id for, from the head of a README."""
    return {found[1]: found[2] for found in _DETAIL.finditer(_head(readme)) if found[2].isprintable()}


def _head(readme: Path) -> str:
    """The metadata at the beginning of a README, as text."""
    if not readme.is_file():
        return ""
    with open(readme, "rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8", "replace")
    parts = re.split(r"^---[ \t]*\r?$", head, maxsplit=2, flags=re.MULTILINE)
    return parts[1].replace("\r", "") if len(parts) == 3 and not parts[0].strip() else ""
