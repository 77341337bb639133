"""`compress report`: a page of charts of one artifact, or of several together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded

TOGETHER = Path("compare.report.html")


def register(app: typer.Typer) -> None:
    app.command("report")(command)


@guarded
def command(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts that compress made.", metavar="ART...", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Where it goes; ART.report.html beside ART, or ./compare.report.html."),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Write a page of charts: sizes, bits and errors per layer, KL, training, time and memory; one HTML file, no network.

    With several artifacts, quality against bytes. What was not measured is said; `eval` and `verify` keep what they find.
    """
    from compress.report.page import report_path, write_report

    place = to or (report_path(artifacts[0]) if len(artifacts) == 1 else TOGETHER)
    path = write_report(artifacts, place)
    console.fact("wrote", f"{path}, {console.size(path.stat().st_size)}")
