"""Escape: untrusted texts as inline code, cells and plain words of Markdown.

The templates take nothing but `Safe` texts and numbers, so that a text that nobody has escaped is an error, not a hole.
"""

from __future__ import annotations

import re


class Safe(str):
    """A text that stands as it is in Markdown."""

    __slots__ = ()


def checked(value: object) -> object:
    """What a template is about to print; TypeError for a text that is not escaped."""
    if isinstance(value, Safe | int | float):
        return value
    raise TypeError(f"not escaped: {value!r:.80}")


def printable(text: str) -> str:
    """A text without line breaks or control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def code(text: str) -> Safe:
    """A text as inline code in a table's cell, where nothing counts as Markdown or HTML."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return Safe(f"{fence}{pad}{printable(text)}{pad}{fence}".replace("|", "\\|"))


def plain(text: str) -> Safe:
    """A text for a heading, a cell or a sentence, with all escaped that is Markdown or HTML, or would become a link."""
    words = re.sub(r"([\\`*_\[\]<>#|~&${}!@])", r"\\\1", printable(text))
    return Safe(re.sub(r"(?i)(?<=www)\.|:(?=//)", r"\\\g<0>", words))


def block(text: str, language: str = "") -> Safe:
    """A text as a fenced block of code."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    lines = "\n".join(printable(line) for line in text.split("\n"))
    return Safe(f"{fence}{language}\n{lines}\n{fence}")
