"""`compress verify`: an artifact's bytes, their meaning, and its readers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.progress import events, waiting
from compress.threads import available, compute_threads

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.errors import FormatError
    from compress.evaluate.records import ReaderRecord
    from compress.evaluate.verify import Bytes, Reading


def register(app: typer.Typer) -> None:
    app.command("verify")(command)


@guarded
def command(
    artifact: Annotated[
        str, typer.Argument(help="An artifact, or a checkpoint in any state.", metavar="ART", show_default=False)
    ],
    reader: Annotated[
        list[str] | None,
        typer.Option(
            "--reader",
            metavar="NAME",
            help="transformers, vllm, native, auto-gptq, gptqmodel, llama.cpp, mlx, peft or ours; may be repeated.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Text to compare logits on; token ids drawn by a seed without it."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The model below an adapter.")] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="Compute dtype of readers; auto is their own.")
    ] = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.Trust = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Check hashes, decode every tensor, and compare a reader's logits with those of the decoded weights.

    A reader that needs another transformers runs in an environment of its own, built once under the user's cache
    (COMPRESS_CACHE moves it).
    """
    from compress.checkpoint.source import open_source
    from compress.context import Context
    from compress.errors import FormatError, UsageError
    from compress.evaluate.readers import reader_named
    from compress.evaluate.verify import read_with, token_ids, verify_bytes

    for name in reader or ():
        reader_named(name)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError("--dtype", "auto, float32, bfloat16 or float16", f"'{dtype}'")
    if base is None and (Path(artifact) / "adapter_config.json").is_file():
        raise UsageError("--base", "the directory of the model below this adapter", "none")

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    checkpoint = open_source(base or artifact, trust_remote_code)
    console.warn_of_code(checkpoint)
    below = checkpoint.path if base is not None else None
    place = Path(artifact) if base is not None else checkpoint.path
    with compute_threads(threads):
        with events(False, json_) as receive:
            found = verify_bytes(checkpoint, Context(threads=threads or available(), events=receive))
        if not json_:
            show_bytes(found)
        ids = token_ids(checkpoint, data) if reader else None
        readings, keep = [], Keeper(Path(artifact), checkpoint if base is None else None)
        for name in reader or ():
            assert ids is not None
            try:
                with waiting("verify", name, json_):
                    readings.append(read_with(name, place, ids, tell, below, dtype, trusted=trust_remote_code))
            except FormatError as error:
                keep.failed(name, error)
                raise
            keep.passed(readings[-1])
            if not json_:
                show_reading(readings[-1])
    if json_:
        content = {"bytes": asdict(found), "readers": [facts(reading) for reading in readings], "kept": keep.where or None}
        print(json.dumps(content, ensure_ascii=False))
    elif keep.where:
        print(f"kept:     {keep.where}")


class Keeper:
    """Keeps what readers did in the artifact, if its manifest names the bytes that they read."""

    def __init__(self, artifact: Path, checkpoint: Checkpoint | None) -> None:
        manifest = checkpoint.manifest if checkpoint is not None and artifact.is_dir() else None
        self.artifact, self.fingerprint, self.where = artifact, manifest.fingerprint if manifest is not None else "", ""

    def passed(self, reading: Reading) -> None:
        """Keeps that a reader computes what the artifact means."""
        from compress.evaluate.verify import as_record

        self.keep(reading.reader, as_record(reading))

    def failed(self, reader: str, error: FormatError) -> None:
        """Keeps that a reader refuses the artifact, or computes something else."""
        from compress.evaluate.records import ReaderRecord, now

        # A message may name the place, which is nobody's business who gets the artifact.
        reason = error.problems[0].got.replace(str(self.artifact.resolve()), "ART").replace(str(self.artifact), "ART")
        self.keep(reader, ReaderRecord(passed=False, when=now(), reason=reason))

    def keep(self, reader: str, record: ReaderRecord) -> None:
        """Adds to the record, but not our own reading compared with itself; says so where nothing can be written."""
        from compress.errors import MachineError
        from compress.evaluate.records import keep_reader

        if not self.fingerprint or reader == "ours":
            return
        try:
            self.where = str(keep_reader(self.artifact, self.fingerprint, reader, record))
        except MachineError as error:
            print(f"note: not kept: {error.problems[0].where}: {error.problems[0].got}", file=sys.stderr)


def facts(reading: Reading) -> dict[str, Any]:
    """A reading as JSON."""
    return {**asdict(reading), "equal": reading.equal}


def show_bytes(found: Bytes) -> None:
    """Prints the results for bytes and decoding."""
    named = "as manifest.json names them" if found.named else "no manifest to compare them with"
    print(f"bytes:    {found.tensors} tensors, {named}")
    print(f"decodes:  {found.decoded} packed weights, all finite" if found.decoded else "decodes:  nothing is packed")
    for reason, count in found.corrected:
        print(f"note:     {count} weights: {reason}")


def show_reading(reading: Reading) -> None:
    """Prints the result for the reader's logits."""
    versions = ", ".join(f"{name} {version}" for name, version in reading.versions.items())
    print(f"reader:   {reading.reader} ({versions})")
    for note in reading.notes:
        print(f"note:     {note}")
    how = f"largest difference {reading.difference:.3g} of {reading.largest:.3g}, KL {reading.kl:.2g}"
    how = f"{reading.typical:.2%} at the median token ({reading.allowed:.2%} allowed), {how}" if reading.rounds else how
    what = "of activations" if reading.rounds else f"in {reading.dtype}"
    print(f"logits:   equal up to rounding {what}: {how}, same top-1 {reading.top1:.1%}, {reading.tokens} tokens")
