"""Sections: the parts of a report, as charts, tables and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.evaluate.records import Number, QualityRecord, ReaderRecord
from compress.report import charts
from compress.report.card import command
from compress.report.facts import Facts, Layer
from compress.report.numbers import estimate as estimate_of
from compress.report.numbers import protocol
from compress.report.numbers import size as size_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_NOT_MEASURED = "not measured: compress eval {name} --against SOURCE --data TEXTS.jsonl --stages"
_UNTOLD = "no step that is kept has {what}; compress clean and --no-keep remove steps"
_MOST_ROWS = 400
"""Rows of a table of layers; the manifest has the others."""
Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page: figures, a table of the same numbers, and what is said where there are none."""

    id: str
    title: str
    figures: tuple[tuple[str, str], ...] = ()
    """What each shows, and its JSON."""
    head: Row = ()
    rows: tuple[Row, ...] = ()
    note: str = ""
    missing: str = ""
    """What is not known, and how to find out."""
    code: str = ""
    """A command to copy."""


def sections(facts: Facts) -> Iterator[Section]:
    """Everything about one artifact."""
    for made in (_size, _quality, _kl, _layers, _sensitivity, _training, _cost, _notes, _readers, _recipe):
        yield made(facts)


def estimate(number: Number, share: bool = False) -> str:
    """A number and its error, which stay together in one line."""
    return estimate_of(number, share).replace(" ", "\N{NO-BREAK SPACE}")


def size(nbytes: float | None) -> str:
    """A size, whose unit stays with its number."""
    return size_of(nbytes).replace(" ", "\N{NO-BREAK SPACE}")


def share_of(nbytes: int | None, source: int) -> str:
    """How much of the source's bytes is left."""
    return f"{nbytes / source:.1%}" if source and nbytes else "-"


def _figures(*made: tuple[str, Figure | None]) -> tuple[tuple[str, str], ...]:
    """Figures as JSON that may stand between tags."""
    return tuple((what, figure.to_json().replace("<", "\\u003c")) for what, figure in made if figure is not None)


def _numbered(facts: Facts) -> list[str]:
    return [f"{number}. {stage.name}" for number, stage in enumerate(facts.stages, 1)]


def _size(facts: Facts) -> Section:
    rows = [
        (
            label,
            size(stage.nbytes),
            share_of(stage.nbytes, facts.source_bytes),
            "-" if stage.bits is None else f"{stage.bits:.3f}",
        )
        for label, stage in zip(_numbered(facts), facts.stages)
    ]
    return Section(
        "size", "Size by stage", _figures(("bytes of tensors after each step", charts.sizes(facts))),
        ("step", "tensors", "of the source", "bits per weight"), (("source", size(facts.source_bytes or None), "", ""), *rows),
        "Bits per weight are those of the whole model, embeddings included.",
    )  # fmt: skip


def _quality(facts: Facts) -> Section:
    rows = [
        (label, f"{record.data}, {record.tokens:,} tokens", estimate(record.perplexity), estimate(record.kl),
         estimate(record.kl_median), estimate(record.kl_p99), estimate(record.top1, True))
        for label, stage in zip(_numbered(facts), facts.stages) for record in stage.quality
    ]  # fmt: skip
    rows += [(task.task, task.dataset or "-", "", "", "", "", f"{task.metric} {task.value:.4g}") for task in facts.tasks]
    note = protocol(facts.quality[0]) + ", by compress " + facts.quality[0].version + "." if facts.quality else ""
    return Section(
        "quality", "Quality", (), ("step", "text", "perplexity", "KL", "median", "99 %", "same top-1"), tuple(rows), note,
        "" if rows else _NOT_MEASURED.format(name=facts.name),
    )  # fmt: skip


def _kl(facts: Facts) -> Section:
    found = next((record.spread for record in facts.quality if record.spread is not None), None)
    if found is None:
        return Section("kl", "KL over tokens", missing=_NOT_MEASURED.format(name=facts.name))
    shares = sorted(found.quantiles, key=lambda share: float(share) if share.replace(".", "", 1).isdigit() else 2.0)
    rows = tuple((f"{share} of the tokens are at or below", f"{found.quantiles[share]:.4g}") for share in shares)
    return Section(
        "kl", "KL over tokens", _figures(("tokens by their KL", charts.spread(facts))), ("share", "nats per token"), rows,
        f"Over {sum(found.counts):,} tokens; what is below 1e-6 counts in the first bar.",
    )  # fmt: skip


def _layers(facts: Facts) -> Section:
    chosen, number = "bits per weight", _bits
    if facts.layers and all(layer.state.scheme is None for layer in facts.layers):
        chosen, number = "share of zeros", _zeros
    rows = [
        (layer.name, str(layer.state), f"{layer.bits:.3f}", _short(layer.error), _short(layer.output_error))
        for layer in facts.layers[:_MOST_ROWS]
    ]  # fmt: skip
    cut = len(facts.layers) - len(rows)
    fields: list[tuple[str, Callable[[Layer], float | None], str]] = [
        (chosen, number, f"{chosen}, as stored"),
        ("error of outputs", lambda layer: layer.output_error, "|(W - W') x| / |W x|"),
        ("error of weights", lambda layer: layer.error, "|W - W'| / |W|"),
    ]
    return Section(
        "layers", "Bits and error per layer", _figures(*((title, charts.layers(facts, of, what)) for title, of, what in fields)),
        ("weight", "state", "bits", "error", "error of outputs"), tuple(rows),
        f"{cut:,} more weights are in manifest.json." if cut else "",
        "" if facts.layers else "no weight is in codes or has zeros that a pass made",
    )  # fmt: skip


def _short(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


def _bits(layer: Layer) -> float | None:
    return layer.bits


def _zeros(layer: Layer) -> float | None:
    return layer.zeros


def _sensitivity(facts: Facts) -> Section:
    made = [(f"each weight, {label}", charts.sensitivity(rows)) for label, rows in facts.allocations.items()]
    note = "" if (drawn := _figures(*made)) else _UNTOLD.format(what="decided bits by sensitivity")
    return Section("sensitivity", "Sensitivity against chosen bits", drawn, note=note)


def _training(facts: Facts) -> Section:
    made = [(f"loss, {label}", charts.training(rows)) for label, rows in facts.training.items()]
    return Section("training", "Training", drawn := _figures(*made), note="" if drawn else _UNTOLD.format(what="trained"))


def _cost(facts: Facts) -> Section:
    rows = [
        (label, "-" if stage.seconds is None else f"{stage.seconds:.1f}",
         ", ".join(f"{word} {value:.1f}" for word, value in stage.spent.items()), size(stage.peak_bytes))
        for label, stage in zip(_numbered(facts), facts.stages)
    ]  # fmt: skip
    made, known = facts.manifest, any(stage.seconds is not None for stage in facts.stages)
    return Section(
        "cost", "Time and memory by step",
        _figures(("seconds of each step", charts.seconds(facts)), ("peak memory", charts.memory(facts))),
        ("step", "seconds", "of which", "peak memory so far"), tuple(rows) if known else (),
        "On the machine that made it: " + ", ".join(filter(None, (made.isa, f"{made.threads} threads", made.device))) + ".",
        "" if known else "not in this manifest: it was made by an earlier version",
    )  # fmt: skip


def _notes(facts: Facts) -> Section:
    rows = [
        (note.what, f"{note.count}", note.reason, ", ".join(note.names[:8]) + (" ..." if note.count > 8 else ""))
        for note in facts.notes
    ]
    covered = facts.manifest.coverage
    said = f"{covered['transformed']} of {covered['targeted']} targeted weights were transformed by the last step, "
    said += f"{covered['skipped']} skipped."
    return Section(
        "notes", "Refusals, fallbacks and other counted lines", (), ("what", "count", "why", "weights"), tuple(rows),
        said if rows else f"{said} There is nothing else to tell.",
    )  # fmt: skip


def _readers(facts: Facts) -> Section:
    rows = [(reader.name, reader.expected, _verified(reader.record), reader.reason) for reader in facts.readers]
    return Section(
        "readers", "Readers", (), ("reader", "expected", "verified on these bytes", "why"), tuple(rows),
        f"compress verify {facts.name} --reader NAME runs a reader's own code." if rows else "",
        "" if rows else "it is not packed for a reader",
    )  # fmt: skip


def _verified(record: ReaderRecord | None) -> str:
    if record is None:
        return "not verified"
    if not record.passed:
        return f"no: {record.reason}"
    kl = f", KL {record.kl:.2g} to the decoded weights" if record.kl is not None else ""
    return f"yes, {record.version}{kl} in {record.dtype}"


def _recipe(facts: Facts) -> Section:
    made, source = facts.manifest, facts.manifest.source
    rows = [
        (
            f"{number}",
            stage.text,
            stage.id[:16],
            ", ".join(f"{word} {digest[:16]}" for word, digest in stage.inputs.items()) or "-",
        )
        for number, stage in enumerate(facts.stages, 1)
    ]
    commit = f", commit {source.commit}" if source.commit else ""
    return Section(
        "recipe", "Recipe, and how to make it again", (), ("step", "what it says", "id", "what it read besides"), tuple(rows),
        f"compress {made.compress_version}, seed {made.seed}; fingerprint {made.fingerprint}; source {source.name}{commit}, "
        f"fingerprint {source.fingerprint}.",
        code=command(facts),
    )  # fmt: skip


def together(artifacts: Sequence[Facts]) -> Section:
    """Several artifacts side by side: quality against bytes where they were measured alike, and a table of all."""
    asked = Counter(record.text[1:] for facts in artifacts for record in facts.quality)
    common = max(asked, key=lambda text: asked[text]) if asked else None
    found: dict[int, QualityRecord] = {}
    for at, facts in enumerate(artifacts):
        for record in facts.quality:
            if record.text[1:] == common:
                found[at] = record
    by_kl = bool(found) and all(record.kl.value is not None for record in found.values())
    points, rows = [], []
    for at, facts in enumerate(artifacts):
        its = found.get(at)
        number = Number() if its is None else its.kl if by_kl else its.perplexity
        if number.value is not None:
            points.append((facts.name, facts.nbytes, number.value, number.error))
        cells = [estimate(its.kl), estimate(its.perplexity), estimate(its.top1, True)] if its is not None else ["-"] * 3
        rows.append((facts.name, size(facts.nbytes), "-" if facts.bits is None else f"{facts.bits:.3f}", *cells, facts.recipe))
    measure = "KL to the source, nats per token" if by_kl else "perplexity"
    apart = [facts.name for at, facts in enumerate(artifacts) if at not in found]
    one = next(iter(found.values()), None)
    note = f"{one.data}: {protocol(one)}." if one is not None else ""
    note += f" Not measured on that text: {', '.join(apart)}." if one is not None and apart else ""
    return Section(
        "compare", "Quality against bytes", _figures((f"{measure}, by bytes of tensors", charts.pareto(points, measure))),
        ("artifact", "tensors", "bits per weight", "KL", "perplexity", "same top-1", "recipe"), tuple(rows), note,
        "" if points else "not measured: run compress eval on each, with the same --against and --data",
    )  # fmt: skip
