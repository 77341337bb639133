"""`compress card`: the model card of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options
from compress.cli.guard import guarded


def register(app: typer.Typer) -> None:
    app.command("card")(command)


@guarded
def command(
    artifact: Annotated[Path, typer.Argument(help="An artifact that compress made.", metavar="ART", show_default=False)],
    write: Annotated[bool, typer.Option("--write", help="Write it into ART as README.md, with its picture.")] = False,
    place: Annotated[
        str, typer.Option("--as", metavar="NAME", help="What the example code loads: a path, or an id on the Hub.")
    ] = "PATH",
    debug: options.Debug = False,
) -> None:
    """Print the model card of ART: what was done, quality as measured, readers as verified, how to load it, the recipe.

    `run` writes one as README.md; after `eval` and `verify` there is more to say, and --write says it.
    """
    from compress.report.card import card
    from compress.report.facts import read_facts
    from compress.report.write_card import write_card

    if write:
        for path in write_card(artifact, place):
            print(f"wrote:    {path}")
    else:
        print(card(read_facts(artifact), place), end="")
