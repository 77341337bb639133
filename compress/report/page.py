"""Page: the report of artifacts, as one HTML file that needs no network.

The library of charts is in the file itself, packed, and unpacked by the browser. Every number of a chart is in a table too. Texts
are escaped by the template's engine; figures are JSON in which no tag can begin.
"""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compress.checkpoint.atomic import write_text
from compress.errors import UsageError
from compress.report.card import summary
from compress.report.escape import printable
from compress.report.facts import Facts, read_facts
from compress.report.numbers import size
from compress.report.sections import Section, estimate, sections, share_of, together


@dataclass(frozen=True)
class Part:
    """One artifact on the page."""

    name: str
    summary: str
    tiles: tuple[tuple[str, str], ...]
    """The numbers to see first."""
    sections: tuple[Section, ...]


def write_report(directories: Sequence[Path], path: Path) -> Path:
    """Writes the report of artifacts. Raises InputError for a directory that compress did not make, MachineError."""
    return write_text(path, report([read_facts(directory) for directory in directories]))


def report_path(out: Path) -> Path:
    """Where the report of an artifact goes: beside it, so that it is not pushed with it."""
    out = Path(os.path.abspath(out))
    return out.with_name(f"{out.name}.report.html")


def report(artifacts: Sequence[Facts]) -> str:
    """The page. Raises UsageError for no artifact."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not artifacts:
        raise UsageError("report", "an artifact, or several", "none")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        title=", ".join(printable(facts.name) for facts in artifacts), library=_library(),
        together=together(artifacts) if len(artifacts) > 1 else None, parts=[_part(facts) for facts in artifacts],
    )  # fmt: skip


@cache
def _library() -> str:
    """The script of plotly, gzipped, as base64."""
    import plotly

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(script.read_bytes(), 6, mtime=0)).decode()


def _part(facts: Facts) -> Part:
    tiles = [("size", size(facts.nbytes)), ("of the source", share_of(facts.nbytes, facts.source_bytes))]
    tiles += [("bits per weight", f"{facts.bits:.3f}")] if facts.bits is not None else []
    if facts.quality:
        first = facts.quality[0]
        tiles += [("KL to the source", estimate(first.kl)), ("perplexity", estimate(first.perplexity))]
        tiles += [("perplexity of the source", estimate(first.source_perplexity)), ("same top-1", estimate(first.top1, True))]
    return Part(facts.name, summary(facts), tuple(tile for tile in tiles if tile[1] != "-"), tuple(sections(facts)))
