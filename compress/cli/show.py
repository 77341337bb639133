"""`compress show`: how a checkpoint came to be, and what is in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.errors import InputError

if TYPE_CHECKING:
    from compress.checkpoint.manifest import Manifest, WeightRecord


def register(app: typer.Typer) -> None:
    app.command("show")(command)


@guarded
def command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that compress made.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row per weight, not per kind of weight.")] = False,
    details: options.Details = False,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show lineage, bits and errors per layer, sizes, and every counted line."""
    from compress.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(directory)
    manifest = checkpoint.manifest
    if manifest is None:
        raise InputError(str(directory), "a checkpoint that compress made (manifest.json)", "one without", "run a recipe on it")
    if json_:
        print(manifest.to_text(), end="")
        return
    source = manifest.source
    extra = [x for x in (source.commit and f"commit {source.commit}", source.licence and f"licence {source.licence}") if x]
    console.fact("source", source.name + (f" ({', '.join(extra)})" if extra else ""))
    for number, step in enumerate(manifest.lineage, start=1):
        console.fact(f"step {number}", step.text + (f"   [{step.id[:12]}]" if details else ""))
    tensors = f"{manifest.format}, {console.size(checkpoint.nbytes)} of tensors"
    console.fact("format", f"{tensors}, fingerprint {manifest.fingerprint[:12]}")
    made = f"compress {manifest.compress_version}, seed {manifest.seed}, {manifest.threads} threads, {manifest.isa}"
    console.fact("made by", made + (f", {manifest.device}" if manifest.device else ""))
    covered = manifest.coverage
    console.fact("coverage", f"{covered['transformed']} of {covered['targeted']} targeted, {covered['skipped']} skipped")
    tables(manifest, layers, details)
    console.notes(manifest.notes)
    measured = manifest.measured
    if {"seconds", "peak_resident_bytes"} <= measured.keys():  # not in the fingerprint, so they may have been removed
        peak = console.size(measured["peak_resident_bytes"])
        console.fact("measured", f"{measured['seconds']} s in the last step, peak memory {peak}")


def tables(manifest: Manifest, layers: bool, details: bool) -> None:
    """Prints a table for each state, with a row for each kind of weight, and what the columns mean."""
    groups: dict[str, dict[tuple[str, str], list[WeightRecord]]] = {}
    for name, record in manifest.weights.items():
        label = name if layers else re.sub(r"\d+", "*", name.removesuffix(".weight"))
        key = (label, "x".join(map(str, record.shape)))
        groups.setdefault(record.state, {}).setdefault(key, []).append(record)
    outputs = any(record.output_error is not None for record in manifest.weights.values())
    columns = {"count": not layers, "shape": details, "bits": True, "weight error": True, "output error": outputs}
    shown = [column for column, asked in columns.items() if asked]
    for number, (state, rows) in enumerate(groups.items()):
        if number:
            print()
        console.table((state, *shown), [(label, *_cells(shape, records, shown)) for (label, shape), records in rows.items()])
    if groups:
        legend = "bits: of each entry, scales and padding included; weight error: |W-W'|/|W|, least-largest"
        console.fact("columns", legend + ("; output error: the same of W x on the calibration tokens" if outputs else ""))


def _cells(shape: str, records: list[WeightRecord], columns: list[str]) -> list[str]:
    found = {
        "count": str(len(records)),
        "shape": shape,
        "bits": f"{sum(record.bits for record in records) / len(records):.3f}",
        "weight error": _range([record.error for record in records]),
        "output error": _range([record.output_error for record in records]),
    }
    return [found[column] for column in columns]


def _range(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    if len(known) > 1:
        return f"{min(known):.4f}-{max(known):.4f}"
    return f"{known[0]:.4f}" if known else "-"
