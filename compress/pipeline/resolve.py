"""Resolve: turns recipe lines into passes; reports errors of all lines at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from compress.contract.discover import load_pass
from compress.contract.pass_base import Pass
from compress.errors import Problem, RecipeError, Unsound, UsageError, did_you_mean
from compress.spec.push import PushOptions
from compress.spec.recipe import Line, Recipe

_SAID = 200
"""Characters of a value that a message quotes."""


def resolve_line(line: Line) -> tuple[Pass | None, list[Problem]]:
    """The pass of a line, or the line's problems."""
    try:
        cls = load_pass(line.name)
    except UsageError as error:
        problem = error.problems[0]
        return None, [Problem(line.where or line.name, problem.expected, f"'{line.name}'{problem.got[len('an unknown name') :]}")]
    try:
        return cls.model_validate(dict(line.options)), []
    except ValidationError as error:
        return None, [problem for detail in error.errors() for problem in _problems(line, cls, detail)]


def resolve_push(line: Line) -> tuple[PushOptions | None, list[Problem]]:
    """The options of a recipe's `push:`, or the line's problems."""
    try:
        return PushOptions.model_validate(dict(line.options)), []
    except ValidationError as error:
        return None, [problem for detail in error.errors() for problem in _problems(line, PushOptions, detail)]


def _problems(line: Line, cls: type[Pass] | type[PushOptions], detail: Any) -> Iterator[Problem]:
    option = str(detail["loc"][0]) if detail["loc"] else ""
    where = f"{line.where or line.name}: {line.name}.{option}".rstrip(".")
    raised = detail.get("ctx", {}).get("error")
    if isinstance(raised, Unsound):
        yield from (replace(problem, where=f"{where}.{problem.where}") for problem in raised.problems)
        return
    known = list(cls.model_fields)
    if detail["type"] == "extra_forbidden":
        yield Problem(where, f"one of {', '.join(known)}", f"an unknown option{did_you_mean(option, known)}")
        return
    described = cls.model_fields[option].description if option in known else ""
    if detail["type"] == "missing" and len(detail["loc"]) == 1:
        yield Problem(where, described or "a value", "nothing", f"give {option}=...")
        return
    message = "one more value" if detail["type"] == "missing" else detail["msg"].removeprefix("Value error, ")
    message = message.removeprefix("Input should be ")
    # A check of several options has no single value; its message names them.
    got = repr(detail["input"]) if option else ""
    yield Problem(where, message, got if len(got) <= _SAID else f"{got[:_SAID]}...", described or "")


def resolve(recipe: Recipe) -> list[Pass]:
    """All passes. Raises RecipeError with every problem of every line."""
    passes, problems = [], []
    for line in recipe.lines:
        found, wrong = resolve_line(line)
        problems += wrong
        if found is not None:
            passes.append(found)
    problems += resolve_push(recipe.push)[1] if recipe.push is not None else []
    if problems:
        raise RecipeError(problems)
    return passes


def json_schema() -> dict[str, Any]:
    """JSON Schema of recipe files, from the installed passes."""
    from compress.contract.discover import caption, pass_files

    definitions: dict[str, Any] = {"push": PushOptions.model_json_schema()}
    lines = []
    for name in pass_files():
        schema = load_pass(name).model_json_schema()
        definitions.update(schema.pop("$defs", {}))
        definitions[name] = {**schema, "title": name, "description": caption(name)}
        lines.append(
            {
                "type": "object",
                "properties": {name: {"$ref": f"#/$defs/{name}"}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress recipe",
        "type": "object",
        "properties": {
            "version": {"const": 1},
            "model": {"type": "string", "description": "a directory or a Hub id, with @revision"},
            "seed": {"type": "integer", "minimum": 0, "default": 0},
            "passes": {"type": "array", "minItems": 1, "items": {"anyOf": [*lines, {"enum": list(pass_files())}]}},
            "push": {"$ref": "#/$defs/push"},
        },
        "required": ["version", "passes"],
        "additionalProperties": False,
        "$defs": definitions,
    }
