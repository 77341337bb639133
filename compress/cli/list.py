"""`compress list`: the passes with their options, and the formats."""

from __future__ import annotations

import typer

from compress.cli.guard import guarded
from compress.contract.discover import caption, caption_of, load_pass, pass_files


def register(app: typer.Typer) -> None:
    app.command("list")(command)


@guarded
def command() -> None:
    """List passes and formats."""
    from pathlib import Path

    from compress.cli.passes import default_of, kind_of
    from compress.kernels import dispatch

    for name in pass_files():
        print(f"{name}: {caption(name)}")
        for key, field in load_pass(name).model_fields.items():
            print(f"    {key} ({kind_of(field.annotation)[1]}, {default_of(field)}): {field.description}")
    print("\nformats of pack:")
    for name in dispatch.formats():
        print(f"    {caption_of(Path(dispatch.__file__).parent / name.replace('-', '_') / 'layout.py')}")
