"""`compress clean`: removes the steps that a run has kept."""

from __future__ import annotations

import typer

from compress.cli import console, options
from compress.cli.guard import guarded


def register(app: typer.Typer) -> None:
    app.command("clean")(command)


@guarded
def command(out: options.Out, debug: options.Debug = False) -> None:
    """Remove OUT's steps; OUT itself stays."""
    from compress.context import Context
    from compress.pipeline.output_paths import clean, steps_folder

    freed = clean(out, Context())
    print(f"removed {steps_folder(out)}: {console.size(freed)}" if freed else f"nothing to clean beside {out}")
