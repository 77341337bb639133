"""`compress recipes`: list, show, copy and check recipes; the schema."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from compress.cli import console, options
from compress.cli.complete import installed
from compress.cli.guard import guarded
from compress.errors import RecipeError, UsageError, did_you_mean
from compress.spec.recipe import Recipe
from compress.spec.recipe_file import read

_PLACEHOLDER = re.compile(r"<([A-Z][A-Z_]*)>")
"""A placeholder: a value that a recipe leaves open."""
Name = Annotated[str, typer.Argument(help="A recipe that is installed, or a file.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")
    for function in (ls, show, cp, validate, schema):
        group.command(function.__name__)(function)
    app.add_typer(group, name="recipes")


def find(name: str) -> Path:
    """The file of a recipe, by path or by the name of an installed one. Raises UsageError."""
    if Path(name).is_file():
        return Path(name)
    known = installed()
    if name not in known:
        raise UsageError(f"recipe '{name}'", f"a file, or one of {', '.join(known)}", f"neither{did_you_mean(name, known)}")
    return known[name]


def opened(name: str) -> Recipe:
    """The recipe of that name or file. Raises RecipeError with every problem in it, of YAML and of options together."""
    try:
        return read(find(name))
    except RecipeError as error:
        if error.rest is None:
            raise
        from compress.pipeline.resolve import resolve

        try:
            resolve(error.rest)
        except RecipeError as more:
            raise RecipeError([*error.problems, *more.problems]) from None
        raise


def to_set(recipe: Recipe) -> dict[str, str]:
    """The placeholders of a recipe: PASS.OPTION as in --set -> the text in place of a value, such as `<TEXTS>.jsonl`."""
    names = [line.name for line in recipe.lines]
    return {
        f"{line.name if names.count(line.name) == 1 else number}.{option}": str(word)
        for number, line in enumerate(recipe.lines, 1)
        for option, value in line.options.items()
        for word in (value if isinstance(value, tuple) else (value,))
        if isinstance(word, str) and _PLACEHOLDER.search(word)
    }


def folded(given: str) -> str:
    """The --set options in one line, or, where a terminal of 80 columns is too narrow, in lines that a shell joins."""
    return given if len(given) <= 76 else given.replace(" --set", " \\\n--set")


def settings(left: dict[str, str]) -> str:
    """The --set options that fill placeholders, each with the placeholder's word as its value."""
    return " ".join(f"--set {option}={_PLACEHOLDER.sub(lambda found: found[1], word)}" for option, word in left.items())


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").rpartition(" -- ")[2].rstrip()


@guarded
def ls() -> None:
    """List the installed recipes, and the placeholders of each."""
    known = installed()
    width = max(map(len, known), default=0)
    for name, path in known.items():
        console.text(f"{name:<{width}}  {_title(path)}", width + 2)
        if left := to_set(read(path)):
            print(textwrap.indent(folded(settings(left)), "    "))
    console.text("\nRun one: `compress run MODEL OUT NAME`, with what stands below its name and values of your own.")


@guarded
def show(name: Name) -> None:
    """Print a recipe."""
    print(find(name).read_text(encoding="utf-8"), end="")
    if left := to_set(opened(name)):
        open_ = ", ".join(f"{option} ({word})" for option, word in left.items())
        print(f"note: placeholders, to be given by --set: {open_}", file=sys.stderr)


@guarded
def cp(name: Name, target: Annotated[Path, typer.Argument(help="Where to; a directory or a new file.")]) -> None:
    """Copy a recipe, to change it."""
    source = find(name)
    place = target / source.name if target.is_dir() else target
    if place.exists():
        raise UsageError(str(place), "a name that is free", "an existing file", "choose another name")
    shutil.copyfile(source, place)
    print(place)


@guarded
def validate(name: Name, debug: options.Debug = False) -> None:
    """Check a recipe: syntax, names and every option."""
    from compress.pipeline.resolve import resolve

    recipe = opened(name)
    passes = resolve(recipe)
    print(f"well-formed: {len(passes)} passes: {recipe.one_liner()}")
    if left := to_set(recipe):
        print(f"placeholders, to be given by: {settings(left)}")


@guarded
def schema() -> None:
    """Print the JSON Schema of recipe files."""
    from compress.pipeline.resolve import json_schema

    print(json.dumps(json_schema(), indent=2))
