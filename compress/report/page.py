"""Page: the report of one artifact or several, as one HTML file that needs no network.

The library of charts is in the file itself, packed, and unpacked by the browser. Every number of a chart is in a table too. Texts
are escaped by the template's engine; figures are JSON in which no tag can begin.
"""

from __future__ import annotations

import base64
import gzip
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.atomic import write_text
from compress.errors import UsageError
from compress.evaluate.records import Number, QualityRecord
from compress.report import charts
from compress.report.card import command, summary
from compress.report.escape import printable
from compress.report.facts import Facts, read_facts
from compress.report.numbers import protocol, range_of, size
from compress.report.numbers import estimate as estimate_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_STAGES_DO = "not measured: compress eval {name} --against SOURCE --data TEXTS.jsonl --stages"
_UNTOLD = "no step that is kept has {what}; compress clean and --no-keep remove steps"
_MOST_ROWS = 400
"""Rows of a table of layers; the manifest has the others."""


@dataclass(frozen=True)
class Section:
    """A part of the page: figures, a table of the same numbers, and what is said where there are none."""

    id: str
    title: str
    figures: tuple[tuple[str, str], ...] = ()
    """What each shows, and its JSON."""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    note: str = ""
    missing: str = ""
    folded: bool = False
    """Whether the table is folded away below the figures."""


@dataclass(frozen=True)
class Part:
    """One artifact on the page."""

    name: str
    summary: str
    tiles: tuple[tuple[str, str], ...]
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
    together = [*_together(artifacts)] if len(artifacts) > 1 else []
    names = ", ".join(printable(facts.name) for facts in artifacts)
    return environment.get_template("report.html.jinja").render(
        title=names, together=together, parts=[_part(facts) for facts in artifacts], library=_library()
    )


def _library() -> str:
    """The script of plotly, gzipped, as base64."""
    import plotly

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(script.read_bytes(), 6, mtime=0)).decode()


def estimate(number: Number, share: bool = False) -> str:
    """A number and its error, which stay together in one line."""
    return estimate_of(number, share).replace(" ", "\N{NO-BREAK SPACE}")


def _figures(*made: tuple[str, Figure | None]) -> tuple[tuple[str, str], ...]:
    """Figures as JSON that may stand between tags."""
    return tuple((what, figure.to_json().replace("<", "\\u003c")) for what, figure in made if figure is not None)


def _part(facts: Facts) -> Part:
    first = facts.quality[0] if facts.quality else None
    tiles = [("size", size(facts.nbytes)), ("of the source", _share(facts.nbytes, facts.source_bytes))]
    tiles += [("bits per weight", f"{facts.bits:.3f}")] if facts.bits is not None else []
    if first is not None:
        tiles += [("KL to the source", estimate(first.kl)), ("perplexity", estimate(first.perplexity))]
        tiles += [("of the source", estimate(first.source_perplexity)), ("same top-1", estimate(first.top1, True))]
    return Part(facts.name, summary(facts), tuple(tile for tile in tiles if tile[1] != "-"), tuple(_sections(facts)))


def _share(nbytes: int, source: int) -> str:
    return f"{nbytes / source:.1%}" if source else "-"


def _sections(facts: Facts) -> Iterator[Section]:
    name = facts.name
    yield Section(
        "size", "Size by stage", _figures(("bytes of tensors after each step", charts.sizes(facts))),
        ("step", "tensors", "of the source", "bits per weight"),
        (("source", size(facts.source_bytes or None), "", ""), *(
            (f"{n}. {s.name}", size(s.nbytes), _share(s.nbytes or 0, facts.source_bytes) if s.nbytes else "-",
             "-" if s.bits is None else f"{s.bits:.3f}") for n, s in enumerate(facts.stages, 1))),
        "Bits per weight are those of the whole model, embeddings included.", folded=True,
    )  # fmt: skip
    yield _quality(facts)
    yield Section(
        "kl", "KL over tokens", _figures(("tokens by their KL", charts.spread(facts))), *_quantiles(facts),
        missing="" if any(record.spread for record in facts.quality) else _STAGES_DO.format(name=name), folded=True,
    )  # fmt: skip
    masked = facts.layers and all(layer.state.scheme is None for layer in facts.layers)
    field = ("share of zeros", lambda layer: layer.zeros) if masked else ("bits per weight", lambda layer: layer.bits)
    rows = [
        (layer.name, str(layer.state), f"{layer.bits:.3f}", range_of([layer.error]).partition(" ")[0],
         range_of([layer.output_error]).partition(" ")[0]) for layer in facts.layers[:_MOST_ROWS]
    ]  # fmt: skip
    cut = len(facts.layers) - len(rows)
    yield Section(
        "layers", "Bits and error per layer",
        _figures(
            (field[0], charts.layers(facts, field[1], f"{field[0]}, as stored")),
            ("error of outputs", charts.layers(facts, lambda layer: layer.output_error, "|(W - W') x| / |W x|")),
            ("error of weights", charts.layers(facts, lambda layer: layer.error, "|W - W'| / |W|")),
        ),
        ("weight", "state", "bits", "error", "error of outputs"), tuple(rows),
        f"{cut:,} more weights are in manifest.json." if cut else "",
        "" if facts.layers else "no weight is in codes or has zeros that a pass made", True,
    )  # fmt: skip
    made = [(label, charts.sensitivity(rows)) for label, rows in facts.allocations.items()]
    drawn = _figures(*((f"sensitivity against chosen bits, {label}", figure) for label, figure in made))
    yield Section(
        "sensitivity",
        "Sensitivity against chosen bits",
        drawn,
        note="" if drawn else _UNTOLD.format(what="decided bits by sensitivity"),
    )
    curves = _figures(*((f"loss, {label}", charts.training(rows)) for label, rows in facts.training.items()))
    yield Section("training", "Training", curves, note="" if curves else _UNTOLD.format(what="trained"))
    yield Section(
        "cost", "Time and memory by step",
        _figures(("seconds of each step", charts.seconds(facts)), ("peak memory", charts.memory(facts))),
        ("step", "seconds", "of which", "peak memory so far"),
        tuple((f"{n}. {s.name}", "-" if s.seconds is None else f"{s.seconds:.1f}",
               ", ".join(f"{word} {value:.1f}" for word, value in s.spent.items()), size(s.peak_bytes))
              for n, s in enumerate(facts.stages, 1)),
        "On the machine that made it: " + ", ".join(filter(None, (
            facts.manifest.isa, f"{facts.manifest.threads} threads", facts.manifest.device))) + ".",
        "" if any(s.seconds is not None for s in facts.stages) else "not in this manifest", True,
    )  # fmt: skip
    coverage = facts.manifest.coverage
    yield Section(
        "notes", "Refusals, fallbacks and other counted lines", (), ("what", "count", "why", "weights"),
        tuple((note.what, f"{note.count}", note.reason, ", ".join(note.names[:8]) + (" ..." if note.count > 8 else ""))
              for note in facts.notes),
        f"{coverage['transformed']} of {coverage['targeted']} targeted weights were transformed by the last step, "
        f"{coverage['skipped']} skipped." + ("" if facts.notes else " There is nothing else to tell."),
    )  # fmt: skip
    yield Section(
        "readers", "Readers", (), ("reader", "expected", "verified on these bytes", "why"),
        tuple((r.name, r.expected, _verified(r.record), r.reason) for r in facts.readers),
        missing="" if facts.readers else "it is not packed for a reader",
        note=f"compress verify {name} --reader NAME runs a reader's own code." if facts.readers else "",
    )  # fmt: skip
    yield Section(
        "recipe", "Recipe, and how to make it again", (), ("step", "what it says", "id", "what it read besides"),
        tuple((f"{n}", s.text, s.id[:16], ", ".join(f"{word} {digest[:16]}" for word, digest in s.inputs.items()) or "-")
              for n, s in enumerate(facts.stages, 1)),
        f"compress {facts.manifest.compress_version}, seed {facts.manifest.seed}; fingerprint {facts.manifest.fingerprint}; "
        f"source {facts.manifest.source.name}" + (f", commit {facts.manifest.source.commit}" if facts.base else "")
        + f", fingerprint {facts.manifest.source.fingerprint}.", missing=command(facts),
    )  # fmt: skip


def _quality(facts: Facts) -> Section:
    """Perplexity, KL and top-1 of every stage on every text."""
    rows = [
        (f"{number}. {stage.name}", f"{record.data}, {record.tokens:,} tokens", estimate(record.perplexity), estimate(record.kl),
         estimate(record.kl_median), estimate(record.kl_p99), estimate(record.top1, True))
        for number, stage in enumerate(facts.stages, 1) for record in stage.quality
    ]  # fmt: skip
    rows += [(task.task, task.dataset or "-", "", "", "", "", f"{task.metric} {task.value:.4g}") for task in facts.tasks]
    note = protocol(facts.quality[0]) + ", by compress " + facts.quality[0].version + "." if facts.quality else ""
    return Section(
        "quality", "Quality", (), ("step", "text", "perplexity", "KL", "median", "99 %", "same top-1"), tuple(rows), note,
        "" if rows else _STAGES_DO.format(name=facts.name),
    )  # fmt: skip


def _quantiles(facts: Facts) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    found = next((record.spread for record in facts.quality if record.spread is not None), None)
    if found is None:
        return (), (), ""
    shares = sorted(found.quantiles, key=lambda share: float(share) if share.replace(".", "", 1).isdigit() else 2.0)
    rows = tuple((f"{share} of the tokens are at or below", f"{found.quantiles[share]:.4g}") for share in shares)
    return ("share", "nats per token"), rows, f"Over {sum(found.counts):,} tokens; below 1e-6 in the first bar."


def _verified(record: Any) -> str:
    if record is None:
        return "not verified"
    if not record.passed:
        return f"no: {record.reason}"
    kl = f", KL {record.kl:.2g} to the decoded weights" if record.kl is not None else ""
    return f"yes, {record.version}{kl} in {record.dtype}"


def _together(artifacts: Sequence[Facts]) -> Iterator[Section]:
    """Several artifacts side by side: quality against bytes where they were measured alike, and a table of all."""
    asked = Counter(record.text[1:] for facts in artifacts for record in facts.quality)
    common = max(asked, key=lambda text: asked[text]) if asked else None
    found: dict[int, QualityRecord] = {}
    for at, facts in enumerate(artifacts):
        for record in facts.quality:
            if record.text[1:] == common:
                found[at] = record
    by_kl = bool(found) and all(record.kl.value is not None for record in found.values())
    points = []
    for at, record in found.items():
        number = record.kl if by_kl else record.perplexity
        if number.value is not None:
            points.append((artifacts[at].name, artifacts[at].nbytes, number.value, number.error))
    measure = "KL to the source, nats per token" if by_kl else "perplexity"
    rows = []
    for at, facts in enumerate(artifacts):
        its = found.get(at)
        cells = [estimate(its.kl), estimate(its.perplexity), estimate(its.top1, True)] if its is not None else ["-"] * 3
        rows.append((facts.name, size(facts.nbytes), "-" if facts.bits is None else f"{facts.bits:.3f}", *cells, facts.recipe))
    apart = [facts.name for at, facts in enumerate(artifacts) if at not in found]
    one = next(iter(found.values()), None)
    note = f"{one.data}: {protocol(one)}." if one is not None else ""
    note += f" Not measured on that text: {', '.join(apart)}." if one is not None and apart else ""
    yield Section(
        "compare", "Quality against bytes", _figures((f"{measure}, by bytes of tensors", charts.pareto(points, measure))),
        ("artifact", "tensors", "bits per weight", "KL", "perplexity", "same top-1", "recipe"), tuple(rows), note,
        "" if points else "not measured: run compress eval on each, with the same --against and --data",
    )  # fmt: skip
