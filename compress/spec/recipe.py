"""Recipe: a list of passes, parsed from YAML or a one-liner, and printed.

    version: 1                            quantize.rtn(scheme=w4a16g64) | pack(format=compressed-tensors)
    passes:
    - quantize.rtn: {scheme: w4a16g64}
    - pack: {format: compressed-tensors}

Both are one grammar: names with dots, options by name, values that are scalars or flat lists of them,
typed as in YAML 1.2 (`2:4` is text, `1e-4` a number). No conditionals, no inheritance: a variant is
another file, or `--set`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from compress.errors import RecipeError, did_you_mean
from compress.spec.strict_json import whole

Scalar = str | int | float | bool | None
Value = Scalar | tuple[Scalar, ...]

NAME = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*")
_OPTION = re.compile(r"[a-z][a-z0-9_]*")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_BARE = re.compile(r"[^\s,()\[\]{}|'\"#&*!%@`?:>-][^\s,()\[\]{}|'\"#]*")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None}
_CONSTANTS = {"": None, "~": None, **{form(word): v for word, v in _WORDS.items() for form in (str, str.title, str.upper)}}
MAX_BYTES = 1 << 20
_MAX_DIGITS = 40


@dataclass(frozen=True)
class Line:
    """One pass of a recipe: its name, its options, and its position (for messages only)."""

    name: str
    options: dict[str, Value]
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        inner = ", ".join(f"{key}={print_value(value)}" for key, value in self.options.items())
        return f"{self.name}({inner})"

    def in_yaml(self) -> str:
        """`name: {option: value}`."""
        inner = ", ".join(f"{key}: {print_value(value)}" for key, value in self.options.items())
        return f"{self.name}: {{{inner}}}"


@dataclass(frozen=True)
class Recipe:
    """A model (if the recipe names one), a seed, and lines in order."""

    lines: tuple[Line, ...]
    model: str | None = None
    seed: int = 0
    push: Line | None = None
    """Where the output is pushed to; a one-liner has none."""

    def one_liner(self) -> str:
        return " | ".join(map(str, self.lines))

    def to_yaml(self) -> str:
        head = ["version: 1"]
        if self.model is not None:
            head.append(f"model: {print_value(self.model)}")
        if self.seed:
            head.append(f"seed: {self.seed}")
        rows = [f"- {line.in_yaml()}" for line in self.lines]
        rows += [self.push.in_yaml()] if self.push is not None else []
        return "\n".join([*head, "passes:", *rows]) + "\n"


def scalar(text: str) -> Scalar:
    """The value of an unquoted word, by YAML 1.2's core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


def print_value(value: Value) -> str:
    """The text of a value in both notations; quoted only where a bare word would read back as something else."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(print_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if value.isprintable() and _BARE.fullmatch(value) and value == scalar(value) and not value.endswith(":"):
        return value
    # Neither notation allows plain control characters, and YAML has no surrogate pairs.
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() or c > "\uffff" else f"\\u{ord(c):04x}" for c in quoted)


class _Cursor:
    """A position in a one-liner; every parser below advances it, or raises RecipeError at its column."""

    def __init__(self, text: str, origin: str) -> None:
        self.text, self.origin, self.at = text, origin, 0
        if not whole(text):
            raise RecipeError(origin, "a text in UTF-8", "bytes that are not")

    @property
    def where(self) -> str:
        return f"{self.origin}:1:{self.at + 1}"

    def fail(self, expected: str) -> RecipeError:
        rest = self.text[self.at : self.at + 20]
        return RecipeError(self.where, expected, f"'{rest}'" if rest else "the end of the text")

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, char: str) -> bool:
        self.space()
        if self.text.startswith(char, self.at):
            self.at += len(char)
            return True
        return False

    def need(self, char: str) -> None:
        if not self.take(char):
            raise self.fail(f"'{char}'")

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        self.space()
        found = pattern.match(self.text, self.at)
        if not found:
            raise self.fail(expected)
        self.at = found.end()
        return found[0]

    def done(self) -> bool:
        self.space()
        return self.at == len(self.text)


def _quoted(cursor: _Cursor) -> str:
    found = re.compile(r'"(?:[^"\\]|\\.)*"').match(cursor.text, cursor.at)
    if found:
        try:
            word = json.loads(found[0])
        except ValueError:
            raise cursor.fail("a quoted text with JSON's escapes") from None
        if not whole(word):
            raise cursor.fail("whole characters, not half of a surrogate pair")
        cursor.at = found.end()
        return str(word)
    found = re.compile(r"'((?:[^']|'')*)'").match(cursor.text, cursor.at)
    if not found:
        raise cursor.fail("a closing quote")
    cursor.at = found.end()
    return found[1].replace("''", "'")


_WORD = re.compile(r"[^\s,()\[\]{}|'\"]+")


def _item(cursor: _Cursor) -> Scalar:
    cursor.space()
    if cursor.text[cursor.at : cursor.at + 1] in ("'", '"'):
        return _quoted(cursor)
    return scalar(cursor.match(_WORD, "a value"))


def _value(cursor: _Cursor) -> Value:
    if not cursor.take("["):
        return _item(cursor)
    items: list[Scalar] = []
    while not cursor.take("]"):
        items.append(_item(cursor))
        if not cursor.take(","):
            cursor.need("]")
            break
    return tuple(items)


def parse_value(text: str, origin: str = "--set") -> Value:
    """Parses a value of a one-liner: a scalar, a quoted text, or a flat list in brackets."""
    cursor = _Cursor(text, origin)
    value = _value(cursor)
    if not cursor.done():
        raise cursor.fail("the end of the value")
    return value


def parse_line(cursor: _Cursor) -> Line:
    """Parses one `name(option=value, ...)`; the parentheses may be left out."""
    cursor.space()
    where = cursor.where
    name = cursor.match(NAME, "the name of a pass")
    options: dict[str, Value] = {}
    if cursor.take("("):
        while not cursor.take(")"):
            cursor.space()
            key_where = cursor.where
            key = cursor.match(_OPTION, "the name of an option")
            if key in options:
                raise RecipeError(key_where, "each option once", f"'{key}' twice")
            cursor.need("=")
            options[key] = _value(cursor)
            if not cursor.take(","):
                cursor.need(")")
                break
    return Line(name, options, where)


def parse_one_liner(text: str, origin: str = "-p") -> Recipe:
    """Parses `pass(option=value, ...) | pass(...)`. Raises RecipeError with line and column."""
    cursor = _Cursor(text, origin)
    lines = [parse_line(cursor)]
    while not cursor.done():
        cursor.need("|")
        lines.append(parse_line(cursor))
    return Recipe(tuple(lines))


def too_long(origin: str) -> RecipeError:
    """The error for a text of more than MAX_BYTES."""
    return RecipeError(origin, f"a recipe of at most {MAX_BYTES:,} bytes", "more", "a variant is another file, or --set")


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Applies `--set pass.option=value`, or `--set N.option=value` (N from 1) if a pass occurs twice."""
    lines = [*recipe.lines, *([recipe.push] if recipe.push is not None else [])]
    for setting in settings:
        path, equals, text = setting.partition("=")
        target, dot, option = path.strip().rpartition(".")
        origin = f"--set {setting}"
        if not equals or not dot or not _OPTION.fullmatch(option):
            raise RecipeError(origin, "--set pass.option=value or --set N.option=value", "something else")
        if target.isdecimal() and target.isascii() and len(target) < 6:
            found = [int(target) - 1] if 0 < int(target) <= len(lines) else []
        else:
            found = [i for i, line in enumerate(lines) if line.name == target]
        if len(found) != 1:
            got = f"{len(found)} lines of that name" if found else "no such line"
            near = "" if found else did_you_mean(target, [line.name for line in lines])
            numbered = ", ".join(f"{i}. {line.name}" for i, line in enumerate(lines, 1))
            raise RecipeError(origin, "one line of the recipe", f"{got}{near}", f"name it by position: {numbered}")
        line = lines[found[0]]
        value = parse_value(text, origin)
        lines[found[0]] = replace(line, options={**line.options, option: value}, where=origin)
    push = lines.pop() if recipe.push is not None else None
    return replace(recipe, lines=tuple(lines), push=push)
