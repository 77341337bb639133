"""Options that several commands share: one flag, one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import complete
from compress.errors import UsageError, did_you_mean

DANGER = "Dangerous options"
Model = Annotated[str, typer.Argument(help="A checkpoint directory, or a Hub id with @revision.", show_default=False)]
Checkpoint = Annotated[str, typer.Argument(help="A checkpoint in any state: a directory, or a Hub id.", metavar="ART")]
Against = Annotated[
    str | None, typer.Option("--against", metavar="SOURCE", help="The checkpoint to compare with, also in any state.")
]
Recipe = Annotated[
    str | None, typer.Argument(help="A recipe file or the name of a recipe that is installed.", autocompletion=complete.recipes)
]
Out = Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)]
Passes = Annotated[
    str | None, typer.Option("-p", "--passes", metavar="TEXT", help="Passes as a one-liner: 'a.b(option=value) | pack'.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Override an option; by position: 2.scheme=...")
]
Seed = Annotated[int | None, typer.Option(help="Seed; by default the recipe's own, or 0.", min=0)]
AllowSkips = Annotated[
    list[str] | None,
    typer.Option("--allow-skips", metavar="REGEX", help="Leave targeted weights that match and cannot be transformed; counted."),
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
    bool, typer.Option("--allow-nonfinite", help="Accept a source with NaN or Inf in it.", rich_help_panel=DANGER)
]
AllowDtype = Annotated[
    bool, typer.Option("--allow-dtype-mismatch", help="Accept weights whose dtype is not config.json's.", rich_help_panel=DANGER)
]
AllowOvercommit = Annotated[
    bool,
    typer.Option("--allow-overcommit", help="Run what is predicted to need more memory than there is.", rich_help_panel=DANGER),
]
Steps = Annotated[
    list[Path] | None,
    typer.Option("--steps", metavar="DIR", help="OUT of another run, or its OUT.steps, to take finished steps from."),
]
Keep = Annotated[bool, typer.Option("--keep/--no-keep", help="Keep the steps beside OUT after a run that succeeded.")]
Report = Annotated[
    bool, typer.Option("--report/--no-report", help="Write OUT.report.html beside OUT: charts of sizes, errors, time and memory.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own Python files (auto_map).", rich_help_panel=DANGER)
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="auto|float32|bfloat16",
        help="Dtype in which models compute during calibration; auto is bfloat16 if both model and device have it.",
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(help="CPU cores to compute on; by default all that this process may use, or OMP_NUM_THREADS.", min=1),
]
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")
Backend = Annotated[str | None, typer.Option("--backend", metavar="NAME", help="Only this one; `compress doctor` lists them.")]
Device = Annotated[str, typer.Option("--device", metavar="|".join(DEVICES), help="auto is a GPU where there is one.")]
On = Annotated[
    str,
    typer.Option(
        "--device", metavar="auto|cpu|cuda|cuda:N", help="Where models compute; auto is a GPU where there is one, else the CPU."
    ),
]
ComputeDtype = Annotated[
    str, typer.Option("--dtype", metavar="|".join(DTYPES), help="Dtype of activations; auto is that of config.json.")
]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="How many tokens to generate at most.", min=1)]
Repack = Annotated[
    bool, typer.Option("--repack", help="Accept an artifact of another tool (GPTQ, AWQ, ...), and pack it while loading.")
]
Details = Annotated[bool, typer.Option("--details", help="Print everything: more columns, whole texts, every reason.")]
Json = Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UsageError for a value that is not one of `known`."""
    if value not in known:
        raise UsageError(option, f"one of {', '.join(known)}", f"'{value}'{did_you_mean(value, known)}")
