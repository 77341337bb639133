"""Options that verbs share: one flag, one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DANGER = "Dangerous options"
Model = Annotated[str, typer.Argument(help="A checkpoint directory, or a Hub id with @revision.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)]
Passes = Annotated[
    str | None, typer.Option("-p", "--passes", metavar="TEXT", help="Passes as a one-liner: 'a.b(option=value) | pack'.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Override an option; by position: 2.scheme=...")
]
Seed = Annotated[int | None, typer.Option(help="Seed; the recipe's own, or 0, without it.", min=0)]
AllowSkips = Annotated[
    list[str] | None,
    typer.Option("--allow-skips", metavar="REGEX", help="Let targeted weights that match stay as they are; counted."),
]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest shard to write, e.g. 500MB or 5GB.")]
FailOn = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-on", metavar="WORD>LIMIT",
        help="Stop with status 7 above a limit: fallbacks>1%, skips>0, unrouted, damped, clamped, zero-rows, error>0.3.",
    ),
]  # fmt: skip
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Take a source with NaN or Inf in it.", rich_help_panel=DANGER)
]
AllowDtype = Annotated[
    bool, typer.Option("--allow-dtype-mismatch", help="Take weights whose dtype is not config.json's.", rich_help_panel=DANGER)
]
AllowOvercommit = Annotated[
    bool,
    typer.Option("--allow-overcommit", help="Run what is predicted to need more memory than there is.", rich_help_panel=DANGER),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that the model brings (auto_map).", rich_help_panel=DANGER)
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="auto|float32|bfloat16",
        help="What models compute in while they are calibrated; auto is bfloat16 where model and CPU have it.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
