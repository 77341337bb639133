"""Console: prints numbers, lines and tables for people."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from compress.spec.presets import preset, remark
from compress.spec.scheme import Scheme

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.spec.recipe import Line, Recipe

_LEAST = 12
"""Fewest columns that a text is folded to."""


def size(nbytes: float) -> str:
    """`16.0 MB`, in decimal units, as on the Hub."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def width() -> int | None:
    """Columns of the output: COLUMNS, or the terminal's; None if neither is known, such as for a file."""
    return shutil.get_terminal_size((0, 0)).columns or None


def text(words: str, hang: int = 10) -> None:
    """Prints a line; a long one is folded and indented, but never inside `a command`."""
    columns = width()
    if columns is None:
        print(words)
        return
    whole = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\xa0"), words)
    indent = " " * hang
    folded = textwrap.wrap(whole, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    for line in folded or [""]:
        print(line.replace("\xa0", " "))


def fact(label: str, words: str) -> None:
    """Prints `label:    words`."""
    text(f"{label + ':':<10}{words}")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], columns: str = "", title: str = "") -> None:
    """Prints a plain table, with numbers aligned right, and below it the meaning of its columns.

    Texts are folded if the table is wider than the output.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(_number(row[i]) for row in cells) and bool(cells) for i in range(len(head))]
    widths = _fitting([max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))], right)

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()

    def show(row: Sequence[str]) -> None:
        for part in zip_longest(*(fold(cell, w) for cell, w in zip(row, widths)), fillvalue=""):
            print(line(part))

    if title:
        print(title)
    show(head)
    print("  ".join("-" * width for width in widths))
    for row in cells:
        show(row)
    if columns:
        fact("columns", columns)


def _fitting(widths: list[int], right: Sequence[bool]) -> list[int]:
    """Widths at which the table fits; the widest columns of text are made narrower."""
    excess = sum(widths) + 2 * (len(widths) - 1) - (width() or 1 << 30)
    while excess > 0:
        widest = max((i for i, number in enumerate(right) if not number), key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] <= _LEAST:
            break
        widths[widest] -= 1
        excess -= 1
    return widths


def fold(cell: str, columns: int) -> list[str]:
    """Folds a cell to lines of at most `columns`, cut after spaces, dots and the like where possible."""
    lines = [""]
    for piece in re.findall(r"[^ .,+]*[ .,+]|[^ .,+]+", cell):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > columns:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > columns:
            lines[-1:] = [lines[-1][:columns], lines[-1][columns:]]
    return [line.rstrip() for line in lines]


def notes(found: Iterable[Any]) -> None:
    """Prints counted lines; those about deviations from what was asked name the first weights."""
    from compress.pipeline.fail_on import NAMED

    for note in found:
        names = f": {', '.join(note.names[:3])}{' ...' if note.count > 3 else ''}" if note.what in NAMED else ""
        text(f"{note.what}: {note.count} ({note.reason}){names}")


def presets(recipe: Recipe) -> None:
    """Prints the scheme that each preset name of another tool in a recipe means."""
    for text in dict.fromkeys(text for line in recipe.lines for text in schemes_of(line)):
        if preset(text) and str(Scheme.parse(text)) != text:
            print(f"note: {remark(text)}", file=sys.stderr)


def schemes_of(line: Line) -> list[str]:
    """The schemes in the options of a recipe's line."""
    values = [value for word in ("scheme", "schemes") for value in [line.options.get(word)]]
    return [text for value in values for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]


def json_line(event: dict[str, Any]) -> None:
    """Prints an event in one write, because several threads print."""
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _number(text: str) -> bool:
    return text[:1].isdigit() or text in ("", "-")


def remarks(event: dict[str, Any]) -> None:
    """Prints events that a user must see even where no progress is shown."""
    if event["event"] == "damaged":
        print(f"note: {event['where']} was damaged and is made again\n{event['reason']}", file=sys.stderr)
    elif event["event"] == "notice":
        print(f"note: {event['step']}: {event['text']}", file=sys.stderr)
    elif event["event"] == "code":
        _warn_of(event["model"], event["files"])


def warn_of_code(checkpoint: Checkpoint) -> None:
    """Names every Python file that a trusted checkpoint brings, before any is run."""
    from compress.checkpoint.remote_code import code_of

    _warn_of(checkpoint.name, code_of(checkpoint))


def _warn_of(model: str, files: dict[str, str]) -> None:
    """Prints the warning, in red on a terminal; no option silences it."""
    from rich.console import Console

    for file, digest in files.items():
        text = f"warning: Python of {model} is run, by --trust-remote-code: {file}, sha256 {digest}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
