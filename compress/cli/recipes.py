"""`compress recipes`: list, show, copy and check recipes; the schema."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options
from compress.cli.guard import guarded
from compress.errors import UsageError, did_you_mean
from compress.recipe import read

Name = Annotated[str, typer.Argument(help="A recipe that is installed, or a file.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")
    for function in (ls, show, cp, validate, schema):
        group.command(function.__name__)(function)
    app.add_typer(group, name="recipes")


def installed() -> dict[str, Path]:
    """Name -> file of the recipes that came with the package."""
    spec = importlib.util.find_spec("compress.recipes")
    folders = spec.submodule_search_locations if spec else None
    return {path.stem: path for folder in folders or [] for path in sorted(Path(folder).glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a recipe, by path or by the name of an installed one. Raises UsageError."""
    if Path(name).is_file():
        return Path(name)
    known = installed()
    if name not in known:
        raise UsageError(f"recipe '{name}'", f"a file, or one of {', '.join(known)}", f"neither{did_you_mean(name, known)}")
    return known[name]


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").rstrip()


@guarded
def ls() -> None:
    """List the installed recipes."""
    known = installed()
    width = max(map(len, known), default=0)
    for name, path in known.items():
        print(f"{name:<{width}}  {_title(path)}")


@guarded
def show(name: Name) -> None:
    """Print a recipe."""
    print(find(name).read_text(encoding="utf-8"), end="")


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
    from compress.resolve import resolve

    recipe = read(find(name))
    passes = resolve(recipe)
    print(f"well-formed: {len(passes)} passes: {recipe.one_liner()}")


@guarded
def schema() -> None:
    """Print the JSON Schema of recipe files."""
    from compress.resolve import json_schema

    print(json.dumps(json_schema(), indent=2))
