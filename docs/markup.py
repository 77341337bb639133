"""Markup: Markdown of docstrings and tables, and links that work in the repository and in the built pages.

Links of hand-written pages point at files of the repository; `link` turns them into links of built pages.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).parents[1]
DOCS, GENERATED = ROOT / "docs", ROOT / "docs" / "generated"
COPIES = {
    "kernels/README.md": "native-format", "kernels/native/README.md": "native-kernels", "recipes/real.md": "measured-real",
    "recipes/methods.md": "measured-methods", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog",
}  # fmt: skip
"""Pages that stand elsewhere in the repository -> their names among those that are generated."""
_LINK = re.compile(r"(?<!\!)\[([^\]\[]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```[^\n]*\n", re.MULTILINE | re.DOTALL)
_LOG = logging.getLogger(__name__)


def cell(text: object) -> str:
    """Text of a table's cell."""
    return inline(str(text)).replace("|", "\\|").replace("\n", " ")


def inline(text: str) -> str:
    """Text as it is: what Markdown would take for markup is escaped, but for code between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if number % 2 else re.sub(r"([<>*\[\]])", r"\\\1", part) for number, part in enumerate(parts))


def prose(text: str) -> str:
    """A docstring as Markdown: indented lines stay as they lie, everything else is paragraphs."""
    found: list[str] = []
    block: list[str] = []

    def flush() -> None:
        while block and not block[-1].strip():
            block.pop()
        if block:
            found.extend(["", "```text", *inspect.cleandoc("\n".join(block)).splitlines(), "```", ""])
            block.clear()

    for line in inspect.cleandoc(text).splitlines():
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
        else:
            flush()
            bullet = re.match(r"[*-] ", line)
            found.append(f"* {inline(line[2:])}" if bullet else inline(line))
    flush()
    return "\n".join(found).strip() + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; cells are escaped unless they are code already."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(each) for each in row)} |" for row in rows)]) + "\n"


def bullets(rows: Iterable[tuple[str, str]]) -> str:
    """A line for each: a link, and what it is."""
    return "".join(f"* {name}: {inline(text)}\n" for name, text in rows)


def docstring(path: Path) -> str:
    """What a module says of itself, read as text."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def link(text: str, source: Path, folder: Path) -> str:
    """Links of a page that lies at `source`, for one in `folder`; what has no page of its own becomes plain text."""

    def turned(match: re.Match[str]) -> str:
        words, target, heading = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists() and not path.is_relative_to(GENERATED):
            _LOG.warning("%s: no such file: %s", source, target)
        inside = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""
        page = GENERATED / f"{COPIES[inside]}.md" if inside in COPIES else DOCS / "index.md" if inside == "README.md" else path
        if not page.is_relative_to(DOCS) or page.suffix != ".md":
            return f"`{inside}`" if words.strip("`") == inside else f"{words} (`{inside}`)"
        return f"[{words}]({Path(os.path.relpath(page, folder)).as_posix()}{heading})"

    fences = _FENCE.findall(text)
    return "".join(_LINK.sub(turned, part) + fence for part, fence in zip(_FENCE.split(text), [*fences, ""], strict=True))
