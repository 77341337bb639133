"""Errors: the tree of exceptions, and the exit status of each branch.

CompressError                      1   any other error that is meant for a user
├── UsageError                     2   an option, a selector or a name is wrong
│   └── RecipeError                2   every problem of every line of a recipe, at once
├── InputError                     3   the checkpoint that came in cannot be used
├── CoverageError                  4   a targeted weight would have stayed as it was
├── FormatError                    5   the format's reader could not load the artifact
├── MachineError                   6   disk, lock, permission, a missing library
└── GateError                      7   more fallbacks, skips or errors than --fail-on allows

A message has four parts: where, expected, got, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the four parts of a message; empty parts are left out when printed."""

    where: str
    expected: str = ""
    got: str = ""
    do: str = ""

    def __str__(self) -> str:
        lines = [self.where]
        for label, text in (("expected", self.expected), ("got", self.got), ("do", self.do)):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        # Control characters in text from files must not reach the terminal.
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in "\n".join(lines))


class CompressError(Exception):
    """Base of every error that is meant for a user. Carries one problem or several."""

    exit_status = 1

    def __init__(self, where: str | Iterable[Problem], expected: str = "", got: str = "", do: str = "") -> None:
        if isinstance(where, str):
            self.problems: tuple[Problem, ...] = (Problem(where, expected, got, do),)
        else:
            self.problems = tuple(where)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UsageError(CompressError):
    """An option, a selector or a name is wrong."""

    exit_status = 2


class RecipeError(UsageError):
    """A recipe cannot be read, or its options do not fit its passes; lists every problem."""

    rest: Any = None
    """The recipe made of the lines that could be read, so that problems with their options can be reported as well."""


class InputError(CompressError):
    """The input checkpoint is damaged, dangerous, unknown or already quantized."""

    exit_status = 3


class CoverageError(CompressError):
    """Weights that a pass targets cannot be transformed by it; names each of them."""

    exit_status = 4


class FormatError(CompressError):
    """The format's reader could not load the artifact that would be packed."""

    exit_status = 5


class MachineError(CompressError):
    """The machine prevents it: disk, lock, permission, a missing library."""

    exit_status = 6


class GateError(CompressError):
    """More fallbacks, skips or errors than --fail-on allows; nothing is published, and finished steps are kept."""

    exit_status = 7


class Unsound(ValueError):  # noqa: N818 (pydantic takes a ValueError for an invalid value)
    """Options of a pass that do not fit together, each problem with the four parts; raised while pydantic validates."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problem.expected for problem in self.problems))


class Refusal(Exception):  # noqa: N818 (no error: an answer that the pipeline counts)
    """Raised by a pass or a format for one weight; the message is the reason, in words.

    Never reaches a user by itself: the pipeline collects refusals and raises one
    CoverageError or FormatError that names every weight, or counts them as skips.
    """

    def __init__(self, reason: str, do: str = "") -> None:
        self.reason = reason
        self.do = do
        super().__init__(reason)


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_LONGEST_NAME = 200
"""Characters of a word up to which names like it are looked for: the search takes seconds for a million."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name nearest to `word`, or the empty string."""
    import difflib

    if len(word) > _LONGEST_NAME:
        return ""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
