"""YAML indentation: finds wrongly indented lines, and suggests the right place.

A line is moved to the indentation of a line above it, the likeliest first; a move is accepted if the parser then gets further.
So a mistake is reported with the corrected line, and problems below it are found as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from compress.errors import Problem

_MOST_BYTES, _MOST_SLIPS = 1 << 14, 10
"""Limits on the file's bytes and on corrections, because every try parses the whole file."""
_STEP = 2
_INLINE = re.compile(r"(\s*-\s+[a-z][a-z0-9_.]*:)\s+([a-z][a-z0-9_]*:\s.*\S)\s*")
"""`- pass: option: value`, which needs braces."""
Reads = Callable[[str], tuple[int, str] | None]
"""Parses a text: (line from 0, message) of the first YAML error, None if there is none."""


def mend(text: str, origin: str, reads: Reads) -> tuple[str, list[Problem]]:
    """The text corrected as far as possible, and a problem for each line that was moved."""
    problems: list[Problem] = []
    while len(text.encode(errors="surrogatepass")) <= _MOST_BYTES and len(problems) < _MOST_SLIPS:
        wrong = reads(text)
        if wrong is None:
            break
        found = _better(text.split("\n"), wrong[0], reads)
        if found is None:
            break
        lines, at = found
        problems.append(_problem(text.split("\n"), lines, at, origin))
        text = "\n".join(lines)
    return text, problems


def _better(lines: list[str], at: int, reads: Reads) -> tuple[list[str], int] | None:
    """(lines with one of them changed so that the parser gets past it, the number of that line)."""
    for number in (at, at - 1):
        if not 0 <= number < len(lines) or not lines[number].strip():
            continue
        for line in dict.fromkeys(_candidates(lines, number)):
            tried = [*lines[:number], line, *lines[number + 1 :]]
            wrong = reads("\n".join(tried))
            if line != lines[number] and (wrong is None or wrong[0] > at):
                return tried, number
    return None


def _candidates(lines: list[str], at: int) -> Iterator[str]:
    """Corrections of a line, the likeliest first."""
    line = lines[at]
    body = line.strip()
    if found := _INLINE.fullmatch(line):
        yield f"{found[1]} {{{found[2]}}}"
    above = [other for other in reversed(lines[:at]) if other.strip() and not other.lstrip().startswith("#")]
    if above and above[0].rstrip().endswith(":"):
        yield " " * (_column(above[0]) + (0 if body.startswith("- ") else _STEP)) + body
    for alike in (True, False):
        for other in above:
            if (other.lstrip().startswith("- ") == body.startswith("- ")) == alike:
                yield " " * (len(other) - len(other.lstrip())) + body
    yield line[: len(line) - len(line.lstrip())].replace("\t", " " * _STEP) + body


def _column(line: str) -> int:
    """The column where the key of a line begins, after the dash of a list."""
    indent = len(line) - len(line.lstrip())
    return indent + len(line.lstrip()) - len(line.lstrip().removeprefix("-").lstrip())


def _problem(before: list[str], after: list[str], at: int, origin: str) -> Problem:
    old, new = before[at], after[at]
    head = old[: len(old) - len(old.lstrip())]
    where = f"{origin}:{at + 1}:{len(head) + 1}"
    if old.strip() != new.strip():
        return Problem(
            where, "valid YAML 1.2: options in braces, or each in a line of its own", f"'{old.strip()}'", example([new])
        )
    indent = len(new) - len(new.lstrip())
    stands = "behind a tab" if "\t" in head else f"behind {spaces(len(head))}"
    shown = [line for line in after[max(0, at - 1) : at] if line.strip()] + [new]
    return Problem(where, f"valid YAML 1.2, this line behind {spaces(indent)}", f"'{old.strip()}' {stands}", example(shown))


def spaces(count: int) -> str:
    """`2 spaces`."""
    return "1 space" if count == 1 else f"{count or 'no'} spaces"


def example(lines: list[str], words: str = "write") -> str:
    """The part of a message that shows which lines to write."""
    return f"{words}\n" + "\n".join(" " * 12 + line for line in lines)
