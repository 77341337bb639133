"""Recipe: a list of passes, from YAML or a one-liner; prints back.

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
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.errors import Problem, RecipeError, did_you_mean

Scalar = str | int | float | bool | None
Value = Scalar | tuple[Scalar, ...]

NAME = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*")
_OPTION = re.compile(r"[a-z][a-z0-9_]*")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_BARE = re.compile(r"[^\s,()\[\]{}|'\"#&*!%@`?:][^\s,()\[\]{}|'\"#]*")
_CONSTANTS: dict[str, Scalar] = {"true": True, "false": False, "null": None, "~": None}
_MAX_BYTES = 1 << 20
_MAX_DIGITS = 40


@dataclass(frozen=True)
class Line:
    """One pass of a recipe: its name, its options, and where it stands (for messages only)."""

    name: str
    options: dict[str, Value]
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        inner = ", ".join(f"{key}={print_value(value)}" for key, value in self.options.items())
        return f"{self.name}({inner})"


@dataclass(frozen=True)
class Recipe:
    """A model (if the recipe names one), a seed, and lines in order."""

    lines: tuple[Line, ...]
    model: str | None = None
    seed: int = 0

    def one_liner(self) -> str:
        return " | ".join(map(str, self.lines))

    def to_yaml(self) -> str:
        head = ["version: 1"]
        if self.model is not None:
            head.append(f"model: {print_value(self.model)}")
        if self.seed:
            head.append(f"seed: {self.seed}")
        rows = []
        for line in self.lines:
            inner = ", ".join(f"{key}: {print_value(value)}" for key, value in line.options.items())
            rows.append(f"- {line.name}: {{{inner}}}")
        return "\n".join([*head, "passes:", *rows]) + "\n"


def scalar(text: str) -> Scalar:
    """The value of an unquoted word, by YAML 1.2's core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def print_value(value: Value) -> str:
    """The text of a value in both notations; quoted only where a bare word would read back as something else."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(print_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    bare = _BARE.fullmatch(value) and value == scalar(value) and not value.endswith(":") and not value.startswith("-")
    return value if bare else json.dumps(value, ensure_ascii=False)


class _Cursor:
    """A place in a one-liner; every reader below moves it on or raises RecipeError at its column."""

    def __init__(self, text: str, origin: str) -> None:
        self.text, self.origin, self.at = text, origin, 0

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
    """A value as it stands in a one-liner: a scalar, a quoted text, or a flat list in brackets."""
    cursor = _Cursor(text, origin)
    value = _value(cursor)
    if not cursor.done():
        raise cursor.fail("the end of the value")
    return value


def parse_line(cursor: _Cursor) -> Line:
    """One `name(option=value, ...)`; the brackets may be left out."""
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
    """`pass(option=value, ...) | pass(...)`. Raises RecipeError with line and column."""
    cursor = _Cursor(text, origin)
    lines = [parse_line(cursor)]
    while not cursor.done():
        cursor.need("|")
        lines.append(parse_line(cursor))
    return Recipe(tuple(lines))


def _events(text: str, origin: str) -> None:
    """Refuses what a recipe has no use for and a hostile file might: anchors, aliases, tags, deep nesting."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionStartEvent, MappingEndEvent, ScalarEvent, SequenceEndEvent

    depth = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        where = f"{origin}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(where, "plain YAML", "an anchor or alias", "write the value out")
        if isinstance(event, (ScalarEvent, CollectionStartEvent)) and getattr(event, "tag", None):
            raise RecipeError(where, "plain YAML", f"the tag {event.tag}", "leave the tag out")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, (MappingEndEvent, SequenceEndEvent))
        if depth > 6:
            raise RecipeError(where, "at most 6 levels of nesting", "more", "see `compress recipes show`")


def parse_yaml(text: str, origin: str = "recipe") -> Recipe:
    """Reads `version: 1` YAML 1.2. Raises RecipeError with every structural problem, each with line and column."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text.encode()) > _MAX_BYTES:
        raise RecipeError(origin, f"a recipe of at most {_MAX_BYTES} bytes", f"{len(text.encode())} bytes")
    try:
        _events(text, origin)
        tree = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise RecipeError(where, "valid YAML 1.2", str(error.problem or error.context)) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(origin, "valid YAML 1.2", str(error).splitlines()[0]) from None
    return _Tree(origin).recipe(tree)


class _Tree:
    """Walks ruamel's tree and gathers problems instead of stopping at the first."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.problems: list[Problem] = []

    def at(self, mark: tuple[int, int] | None) -> str:
        return f"{self.origin}:{mark[0] + 1}:{mark[1] + 1}" if mark else self.origin

    def wrong(self, where: str, expected: str, got: str, do: str = "") -> None:
        self.problems.append(Problem(where, expected, got, do))

    def recipe(self, root: object) -> Recipe:
        if not isinstance(root, dict):
            raise RecipeError(self.origin, "a mapping with version and passes", _kind(root))
        tree: Any = root  # ruamel's mapping, which knows its lines and columns
        known = ("version", "model", "seed", "passes")
        for key in tree:
            if key not in known:
                where = self.at(tree.lc.key(key))
                self.wrong(where, f"one of {', '.join(known)}", f"'{key}'{did_you_mean(str(key), known)}")
        if tree.get("version") != 1 or isinstance(tree.get("version"), bool):
            where = self.at(tree.lc.key("version") if "version" in tree else None)
            got = f"version {tree['version']}" if "version" in tree else "no version"
            self.wrong(where, "version: 1", got, "begin with `version: 1`")
        model, seed = tree.get("model"), tree.get("seed", 0)
        if model is not None and not isinstance(model, str):
            self.wrong(self.at(tree.lc.value("model")), "a directory or a Hub id", _kind(model))
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            self.wrong(self.at(tree.lc.value("seed")), "a whole number >= 0", str(seed))
            seed = 0
        passes = tree.get("passes")
        lines: list[Line] = []
        if not isinstance(passes, list) or not passes:
            where = self.at(tree.lc.value("passes") if "passes" in tree else None)
            self.wrong(where, "passes: a list of `- name: {options}`", _kind(passes))
        else:
            marks: Any = passes  # ruamel's list
            lines = [line for i, entry in enumerate(passes) if (line := self.line(entry, marks.lc.item(i)))]
        if self.problems:
            raise RecipeError(self.problems)
        return Recipe(tuple(lines), str(model) if model is not None else None, int(seed))

    def line(self, entry: Any, mark: tuple[int, int]) -> Line | None:
        where = self.at(mark)
        if isinstance(entry, str):
            entry, options = {entry: None}, None
        elif not isinstance(entry, dict) or len(entry) != 1:
            self.wrong(where, "one pass, `name: {options}`", _kind(entry))
            return None
        name, options = next(iter(entry.items()))
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self.wrong(where, "the name of a pass", f"'{name}'")
            return None
        if options is None:
            return Line(str(name), {}, where)
        if not isinstance(options, dict):
            self.wrong(where, f"options of {name} as a mapping", _kind(options))
            return None
        values: dict[str, Value] = {}
        marks: Any = options
        for key, value in options.items():
            spot = self.at(marks.lc.value(key))
            if not isinstance(key, str):
                self.wrong(spot, "the name of an option", f"'{key}'")
            elif isinstance(value, list) and all(_is_scalar(item) for item in value):
                values[str(key)] = tuple(_plain(item) for item in value)
            elif _is_scalar(value):
                values[str(key)] = _plain(value)
            else:
                self.wrong(spot, f"{name}.{key}: a scalar or a flat list", _kind(value))
        return Line(str(name), values, where)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _plain(value: Any) -> Scalar:
    """ruamel's scalar subclasses back to Python's own."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "a mapping", list: "a list", str: f"the text '{value}'", type(None): "nothing"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), f"the value {value}")


def read(path: Path) -> Recipe:
    """Reads a recipe file. Raises RecipeError."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise RecipeError(str(path), "a recipe file", error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise RecipeError(str(path), "a recipe in UTF-8", "bytes that are not") from None


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Applies `--set pass.option=value`, or `--set N.option=value` (N from 1) where a pass occurs twice."""
    lines = list(recipe.lines)
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
    return replace(recipe, lines=tuple(lines))
