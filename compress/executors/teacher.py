"""Teacher: opens and identifies the model that a training pass learns from.

Without a name it is the dense model that the student was made from: the run's source, or, if that has already been
pruned, quantized or trained, the model of the Hub that its manifest names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.remote_code import tell_code
from compress.checkpoint.scan import SourceScan, scan_source
from compress.checkpoint.source import open_headers, open_source
from compress.context import Context
from compress.contract.notes import trained_by
from compress.contract.shapes import TrainPass
from compress.errors import InputError


@dataclass(frozen=True)
class Teacher:
    """An opened teacher and the fingerprint of its content."""

    checkpoint: Checkpoint
    fingerprint: str


def open_teacher(pass_: TrainPass, source: Checkpoint, scan: SourceScan, ctx: Context) -> Teacher | None:
    """The teacher of a pass in a run over `source`. Raises CompressError for one that cannot teach its model."""
    name = _name(pass_, source)
    if name is None:
        return None
    if not name:
        return Teacher(source, scan.fingerprint)
    # A dense parent is named by a manifest, not by the user, so its code is not trusted.
    teacher = open_source(name, source.trusted and bool(pass_.second_name()))
    tell_code(teacher, ctx)
    from compress.layerwise.eval_windows import tokenizer_folder

    tokenizer_folder(teacher, source)  # raises if the teacher's tokenizer differs
    quiet = replace(ctx, events=lambda event: None)
    # One process reads every byte and broadcasts the fingerprint.
    return Teacher(teacher, ctx.broadcast(scan_source(teacher, quiet).fingerprint if ctx.is_main else None))


def teacher_headers(pass_: TrainPass, source: Checkpoint) -> Checkpoint | None:
    """The teacher, from headers only; None without one. Raises CompressError for one that cannot teach its model."""
    name = _name(pass_, source)
    if name is None:
        return None
    teacher = source if not name else open_headers(name)
    pass_.check_teacher(source, teacher)
    return teacher


def _name(pass_: TrainPass, source: Checkpoint) -> str | None:
    """The name to open: None for no teacher, empty for `source` itself."""
    name, word = pass_.second_name(), "teacher" if pass_.teacher_model() is not None else "reference"
    manifest = source.manifest
    if name or name is None or manifest is None or not is_changed(source):
        return name
    dense_parent = manifest.source
    if dense_parent.commit:
        return f"{dense_parent.name}@{dense_parent.commit}"
    expected = f"{word}: the dense model it was made from, {dense_parent.name}"
    got = "its name only, for a manifest tells no directories"
    raise InputError(str(source.path), expected, got, f"set {word} to the directory of {dense_parent.name}")


def is_changed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's weights differ from those of the model that it was made from."""
    manifest = checkpoint.manifest
    return manifest is not None and bool(manifest.weights or manifest.structure or trained_by(manifest.notes))
