"""Passes: a command per pass; its fields are flags, their descriptions the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from compress.cli import options
from compress.cli.guard import guarded
from compress.cli.run import RunFlags, execute
from compress.contract.discover import load_pass
from compress.spec.recipe import Line, Recipe, Value

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from compress.contract.pass_base import Pass

_COMMON = {
    "seed": (options.Seed, None), "allow_skips": (options.AllowSkips, None), "shard_size": (options.ShardSize, "5GB"),
    "dtype": (options.Dtype, "auto"), "device": (options.On, "auto"), "threads": (options.Threads, None),
    "fail_on": (options.FailOn, None), "report": (options.Report, True),
    "allow_nonfinite": (options.AllowNonfinite, False), "allow_dtype_mismatch": (options.AllowDtype, False),
    "allow_overcommit": (options.AllowOvercommit, False), "trust_remote_code": (options.Trust, False),
    "json_": (options.Json, False), "quiet": (options.Quiet, False), "debug": (options.Debug, False),
}  # fmt: skip


def placeholder(name: str) -> Callable[[], None]:
    """Stands for a pass in a list of commands; never run, because a command line that names the pass gets `command_for`."""

    def function() -> None:
        raise AssertionError(name)

    return function


def command_for(name: str) -> Callable[..., None]:
    """The command of one pass, with a signature made from its fields."""
    cls = load_pass(name)

    def function(model: str, out: Path, **given: Any) -> None:
        common = {key: given.pop(key) for key in _COMMON if key != "debug"}
        given.pop("debug")
        chosen = {key: value for key, value in given.items() if value not in (None, [])}
        line = Line(name, {key: as_value(value) for key, value in chosen.items()}, name)
        execute(Recipe((line,)), model, out, RunFlags(**common))

    parameters = [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=options.Model),
        inspect.Parameter("out", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=options.Out),
        *(_parameter(key, cls) for key in cls.model_fields),
        *(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in _COMMON.items()
        ),
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__name__ = name.replace(".", "_")
    return guarded(function)


def as_value(value: Any) -> Value:
    """The value that typer gives, as a recipe has it."""
    return tuple(value) if isinstance(value, list) else value


def kind_of(annotation: Any) -> tuple[type, str]:
    """(what typer parses, what the help shows) for a field's type; pydantic checks the value itself."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return kind_of(next(arg for arg in args if arg is not NoneType))
    if origin is Literal:
        return str, "|".join(map(str, args))
    if origin in (tuple, list):
        return list, kind_of(args[0])[1]
    if annotation in (bool, int, float):
        return annotation, annotation.__name__.upper()
    return str, "TEXT" if annotation is str else annotation.__name__.upper()


def default_of(field: FieldInfo) -> str:
    """`required`, or the default as a user would type it."""
    if field.is_required():
        return "required"
    default = field.get_default()
    if isinstance(default, bool):
        return f"default: {'on' if default else 'off'}"
    return (
        f"default: {', '.join(map(str, default)) if isinstance(default, tuple) else default}"
        if default not in (None, ())
        else "default: none"
    )


def _parameter(key: str, cls: type[Pass]) -> inspect.Parameter:
    field = cls.model_fields[key]
    kind, shown = kind_of(field.annotation)
    text = f"{field.description} ({default_of(field)})"
    flag = f"--{key.replace('_', '-')}"
    if kind is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        option = typer.Option(flag, metavar=shown, help=text, show_default=False)
        annotation = Annotated[list[str] | None, option] if kind is list else Annotated[kind | None, option]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
