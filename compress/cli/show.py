"""`compress show`: how a checkpoint came to be, and what is in it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.errors import InputError

if TYPE_CHECKING:
    from compress.manifest import Manifest, WeightRecord


def register(app: typer.Typer) -> None:
    app.command("show")(verb)


@guarded
def verb(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that compress made.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row per weight, not per kind of weight.")] = False,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show lineage, bits and errors per layer, sizes, and every counted line."""
    from compress.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(directory)
    manifest = checkpoint.manifest
    if manifest is None:
        raise InputError(str(directory), "a checkpoint that compress made (manifest.json)", "one without", "run a recipe on it")
    if json_:
        print(manifest.to_text(), end="")
        return
    source = manifest.source
    extra = [x for x in (source.commit and f"commit {source.commit}", source.licence and f"licence {source.licence}") if x]
    print(f"source:   {source.name}" + (f" ({', '.join(extra)})" if extra else ""))
    for number, step in enumerate(manifest.lineage, start=1):
        print(f"step {number}:   {step.text}   [{step.id[:12]}]")
    print(f"format:   {manifest.format}, {console.size(checkpoint.nbytes)} of tensors, fingerprint {manifest.fingerprint[:12]}")
    print(
        f"made by:  compress {manifest.compress_version}, seed {manifest.seed}, {manifest.threads} threads, {manifest.isa}"
        + (f", {manifest.device}" if manifest.device else "")
    )
    covered = manifest.coverage
    print(f"coverage: {covered['transformed']} of {covered['targeted']} targeted, {covered['skipped']} skipped")
    console.table(("weights", "count", "state", "shape", "bits", "error", "output error"), _rows(manifest, layers))
    console.notes(manifest.notes)
    measured = manifest.measured
    if {"seconds", "peak_resident_bytes"} <= measured.keys():  # what is measured is not sealed, and may be cut out
        print(f"measured: {measured['seconds']} s in the last step, peak memory {console.size(measured['peak_resident_bytes'])}")


def _rows(manifest: Manifest, layers: bool) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, ...], list[WeightRecord]] = defaultdict(list)
    for name, record in manifest.weights.items():
        label = name if layers else re.sub(r"\d+", "*", name)
        groups[(label, record.state, "x".join(map(str, record.shape)))].append(record)
    rows: list[tuple[str, ...]] = []
    for (label, state, shape), records in groups.items():
        bits = sum(record.bits for record in records) / len(records)
        errors = _range([record.error for record in records])
        outputs = _range([record.output_error for record in records])
        rows.append((label, str(len(records)), state, shape, f"{bits:.3f}", errors, outputs))
    return rows


def _range(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    if len(known) > 1:
        return f"{min(known):.4f} to {max(known):.4f}"
    return f"{known[0]:.4f}" if known else "-"
