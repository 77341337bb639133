"""Recipe files: parses YAML into a recipe; every problem has line and column.

The YAML library's own types (dates, 0x1F) are not used: plain words are typed by `recipe.scalar`, as in a one-liner.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress.errors import Problem, RecipeError, did_you_mean
from compress.spec.recipe import MAX_BYTES, NAME, Line, Recipe, Scalar, Value, print_value, scalar, too_long
from compress.spec.strict_json import whole
from compress.spec.yaml_indentation import example, mend

_OPTION = re.compile(r"[a-z][a-z0-9_]*")
_PUSH = "push"
_SHAPE = ["passes:", "- quantize.rtn: {scheme: w4a16g64}", "- pack: {format: native}"]
"""An example recipe, for messages."""


def parse_yaml(text: str, origin: str = "recipe") -> Recipe:
    """Reads `version: 1` YAML 1.2. Raises RecipeError with every structural problem, each with line and column."""
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise too_long(origin)
    return _parse(text, origin)


def read(path: Path) -> Recipe:
    """Reads a recipe file. Raises RecipeError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise too_long(path.name)
        return parse_yaml(path.read_text(encoding="utf-8-sig"), path.name)
    except OSError as error:
        raise RecipeError(str(path), "a recipe file", error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise RecipeError(str(path), "a recipe in UTF-8", "bytes that are not") from None


def _parse(text: str, origin: str) -> Recipe:
    """Reads `version: 1` YAML 1.2. Raises RecipeError with every structural problem, each with line and column.

    The error holds the recipe as far as it could be read, so that problems of options can be reported as well.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    def reads(text: str) -> tuple[int, str] | None:
        try:
            YAML(typ="rt", pure=True).compose(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            return (mark.line if mark else 0), str(error.problem or error.context)
        except (YAMLError, ValueError, RecursionError) as error:
            return 0, str(error)
        return None

    problems: list[Problem] = []
    try:
        try:
            _events(text, origin)
        except MarkedYAMLError:
            text, problems = mend(text, origin, reads)
            _events(text, origin)
        root = YAML(typ="rt", pure=True).compose(text)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        lines = text.splitlines()
        said = (
            f", in '{_short(lines[mark.line].strip())}'" if mark and mark.line < len(lines) and lines[mark.line].strip() else ""
        )
        wrong = Problem(where, "valid YAML 1.2", f"{error.problem or error.context}{said}", example(_SHAPE, "as here:"))
        raise RecipeError([*problems, wrong]) from None
    except (YAMLError, ValueError, RecursionError) as error:
        wrong = Problem(origin, "valid YAML 1.2", str(error).splitlines()[0], example(_SHAPE, "as here:"))
        raise RecipeError([*problems, wrong]) from None
    return _Tree(origin, problems).recipe(root)


def _events(text: str, origin: str) -> None:
    """Refuses what no recipe needs but a hostile file might use: anchors, aliases, tags, deep nesting."""
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


class _Tree:
    """Walks YAML's nodes, and collects problems instead of stopping at the first."""

    def __init__(self, origin: str, problems: list[Problem]) -> None:
        self.origin, self.problems = origin, problems

    def wrong(self, node: Any, expected: str, got: str, do: str = "") -> None:
        where = f"{self.origin}:{node.start_mark.line + 1}:{node.start_mark.column + 1}" if node is not None else self.origin
        self.problems.append(Problem(where, expected, got, do))

    def mapping(self, node: Any) -> dict[str, Any]:
        """Key -> (its node, the value's node)."""
        return self.mapping_of(node.value)

    def mapping_of(self, pairs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key.id != "scalar":
                self.wrong(key, "a word for a key", _kind(key))
            elif key.value in found:
                self.wrong(key, "each key once", f"'{_short(key.value)}' twice")
            else:
                found[key.value] = (key, value)
        return found

    def recipe(self, root: Any) -> Recipe:
        if root is None or root.id != "mapping":
            raise RecipeError(self.origin, "a mapping with version and passes", _kind(root))
        known, tree = ("version", "model", "seed", "passes", _PUSH), self.mapping(root)
        for word, (key, _) in tree.items():
            if word not in known:
                self.wrong(key, f"one of {', '.join(known)}", f"'{_short(word)}'{did_you_mean(word, known)}")
        nodes = {word: tree.get(word, (None, None))[1] for word in known}
        values: dict[str, Any] = {
            word: self.value(node, word) for word, node in nodes.items() if node and word not in ("passes", _PUSH)
        }
        version, model, seed = values.get("version"), values.get("model"), values.get("seed", 0)
        if version != 1 or not isinstance(version, int) or isinstance(version, bool):
            got = f"version {_short(str(version))}" if "version" in tree else "no version"
            self.wrong(tree.get("version", (None,))[0], "version: 1", got, "begin with `version: 1`")
        if model is not None and not isinstance(model, str):
            self.wrong(nodes["model"], "a directory or a Hub id", _kind(nodes["model"]))
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            self.wrong(nodes["seed"], "a whole number >= 0", _kind(nodes["seed"]))
        passes, lines = nodes["passes"], []
        if passes is None or passes.id != "sequence" or not passes.value:
            self.wrong(passes, "passes: a list of `- name: {options}`", _kind(passes), example(_SHAPE, "as here:"))
        if passes is not None and passes.id == "mapping":
            lines = [line for key, options in passes.value if (line := self.pass_(key, key, options))]
        elif passes is not None and passes.id == "sequence":
            lines = [line for entry in passes.value if (line := self.line(entry))]
        push = self.pass_(tree[_PUSH][0], *tree[_PUSH]) if _PUSH in tree else None
        if self.problems:
            error = RecipeError(self.problems)
            error.rest = Recipe(tuple(lines), push=push)
            raise error
        return Recipe(tuple(lines), model, seed, push)

    def line(self, entry: Any) -> Line | None:
        if entry.id == "mapping" and len(entry.value) == 1:
            return self.pass_(entry, *entry.value[0])
        if entry.id == "mapping" and (line := self.unindented(entry)):
            return line
        return self.pass_(entry, entry, None)

    def unindented(self, entry: Any) -> Line | None:
        """A pass whose options are not indented under it, a common mistake: reported, and read as it was meant."""
        (first, given), *others = entry.value
        empty = given.id == "scalar" and _plain(given) is None
        if first.id != "scalar" or not NAME.fullmatch(first.value) or not (empty or given.id == "mapping"):
            return None
        if any(key.id != "scalar" or not _OPTION.fullmatch(key.value) or value.id == "mapping" for key, value in others):
            return None
        name, words = first.value, [key.value for key, _ in others]
        pairs = [*(given.value if given.id == "mapping" else ()), *others]
        lines = [f"{key.value}: {print_value(_shown(value))}" for key, value in pairs if key.id == "scalar"]
        do = example([f"- {name}:", *(f"    {line}" for line in lines)])
        got = f"'{_short(', '.join(words))}' in the column of {name}"
        self.wrong(others[0][0], f"options indented under {name}", got, do)
        options = {word: self.value(value, f"{name}.{word}") for word, (_, value) in self.mapping_of(pairs).items()}
        return Line(name, options, f"{self.origin}:{entry.start_mark.line + 1}:{entry.start_mark.column + 1}")

    def pass_(self, entry: Any, key: Any, options: Any) -> Line | None:
        """One pass, by its key and its options."""
        if key.id != "scalar":
            self.wrong(entry, "one pass, `name: {options}`", _kind(entry), example(["- name: {option: value}"]))
            return None
        name, where = key.value, f"{self.origin}:{entry.start_mark.line + 1}:{entry.start_mark.column + 1}"
        if name == _PUSH and entry is not key:
            self.wrong(entry, "passes", "push, which is none", example(["push: {repo: OWNER/NAME}"], "write it below them:"))
            return None
        if not NAME.fullmatch(name):
            glued = ":" in name.partition(" ")[0].rstrip(":")
            self.wrong(entry, "the name of a pass", f"'{_short(name)}'", "put a space behind the colon" if glued else "")
            return None
        if options is None or (options.id == "scalar" and _plain(options) is None):
            return Line(name, {}, where)
        if options.id != "mapping":
            self.wrong(entry, f"options of {name} as a mapping", _kind(options), example([f"- {name}: {{option: value}}"]))
            return None
        return Line(name, {word: self.value(v, f"{name}.{word}") for word, (_, v) in self.mapping(options).items()}, where)

    def value(self, node: Any, what: str) -> Value:
        """A scalar, or a flat list of scalars."""
        items = node.value if node.id == "sequence" else [node]
        if any(item.id != "scalar" for item in items):
            self.wrong(node, f"{_short(what)}: a scalar or a flat list", _kind(node))
            return None
        found = tuple(_plain(item) for item in items)
        if any(isinstance(word, str) and not whole(word) for word in found):
            self.wrong(node, f"{_short(what)}: whole characters", "half of a surrogate pair")
        return found if node.id == "sequence" else found[0]


def _shown(node: Any) -> Value:
    """A node's value, for an example in a message."""
    return tuple(_plain(item) for item in node.value if item.id == "scalar") if node.id == "sequence" else _plain(node)


def _plain(node: Any) -> Scalar:
    """The value of a scalar's node; a quoted one is a text."""
    return str(node.value) if node.style else scalar(node.value)


def _kind(node: Any) -> str:
    if node is None or (node.id == "scalar" and _plain(node) is None):
        return "nothing"
    words = {"mapping": "a mapping", "sequence": "a list"}
    return words.get(node.id) or f"the {'text' if isinstance(_plain(node), str) else 'value'} '{_short(node.value)}'"


def _short(text: str) -> str:
    """A text shortened to one line, for a message."""
    return text if len(text) <= 60 and text.isprintable() else f"{ascii(text[:60])[1:-1]}..."
