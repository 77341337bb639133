"""`compress generate`: a few words from a checkpoint, to see that it speaks."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded


def register(app: typer.Typer) -> None:
    app.command("generate")(verb)


@guarded
def verb(
    model: Annotated[str, typer.Argument(help="A checkpoint in any state: a directory, or a Hub id.", metavar="DIR")],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What it goes on from.")],
    tokens: Annotated[int, typer.Option(help="How many tokens at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0, max=(1 << 63) - 1)] = 0,
    trust_remote_code: options.Trust = False,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt: a smoke test of a checkpoint, in fp32, with all of it in memory (codes as codes)."""
    from transformers.utils import logging

    from compress.sample import sample
    from compress.source import open_source

    logging.set_verbosity_error()
    checkpoint = open_source(model, trust_remote_code)
    console.warn_of_code(checkpoint)
    print(sample(checkpoint, prompt, tokens, temperature, seed))
