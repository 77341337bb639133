"""App: the typer app, with a command per pass made from its fields.

Only the passes that the command line names are imported; `compress --help` reads captions as text.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from compress import __version__
from compress.cli import (
    bench,
    card,
    clean,
    demo,
    diff,
    doctor,
    formats,
    generate,
    knowledge,
    plan,
    push,
    recipes,
    report,
    run,
    serve,
    show,
    verify,
)
from compress.cli import eval as eval_
from compress.cli import list as list_
from compress.cli.passes import command_for, placeholder
from compress.contract.discover import caption, pass_files

PANEL = "Passes"


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


def build(arguments: Sequence[str]) -> typer.Typer:
    """The app for one command line."""
    app = typer.Typer(
        name="compress",
        help="A compiler for model checkpoints: runs a recipe of passes over a checkpoint on disk.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
    ) -> None:
        pass

    for module in (
        run,
        plan,
        eval_,
        knowledge,
        diff,
        verify,
        push,
        generate,
        serve,
        show,
        card,
        report,
        list_,
        formats,
        doctor,
        bench,
        recipes,
        clean,
        demo,
    ):
        module.register(app)
    groups: dict[str, typer.Typer] = {}
    for name in pass_files():
        group, _, command = name.rpartition(".")
        asked = bool(arguments) and arguments[0] == (group or command)
        function = command_for(name) if asked else placeholder(name)
        if group and group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True, help=f"The {group} passes, each by itself.")
            app.add_typer(groups[group], name=group, rich_help_panel=PANEL)
        target = groups[group] if group else app
        target.command(command.replace("_", "-"), help=caption(name), rich_help_panel=None if group else PANEL)(function)
    return app
