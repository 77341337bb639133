"""Teacher: opens and identifies the model that a training pass learns from.

Without a name it is the dense model that the student was made from: the run's source, or, if that has already been
pruned, quantized or trained, the model of the Hub that its manifest names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.remote_code import tell_code
from compress.checkpoint.scan import SourceScan, scan_source
from compress.checkpoint.source import open_headers, open_source
from compress.context import Context
from compress.contract.block_training import BlockTrainPass
from compress.contract.notes import trained_by
from compress.contract.train_pass import TrainPass
from compress.errors import InputError, Problem
from compress.layerwise.dense_view import DenseView
from compress.spec.weight_state import Weight


@dataclass(frozen=True)
class Teacher:
    """An opened teacher and the fingerprint of its content."""

    checkpoint: Checkpoint
    fingerprint: str


def open_teacher(pass_: TrainPass | BlockTrainPass, source: Checkpoint, scan: SourceScan, ctx: Context) -> Teacher | None:
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


def open_twin(pass_: BlockTrainPass, source: Checkpoint, weights: Sequence[Weight]) -> Checkpoint:
    """The headers of the dense twin. Raises CompressError if there is none, or one with other shapes."""
    name = _name(pass_, source)
    twin = source if not name else open_headers(name)
    check_twin(twin, weights)
    return twin


def check_twin(twin: Checkpoint, weights: Sequence[Weight]) -> None:
    """Raises InputError unless a model has every one of these weights, in its shape: blocks are compared output by output."""
    shapes = {name: entry.shape for name, entry in DenseView(twin).logical.items()}
    wrong = [weight for weight in weights if shapes.get(weight.name) != weight.shape]
    if wrong:
        first = wrong[0]
        got = f"{list(shapes[first.name])}" if first.name in shapes else "none"
        more = f", and {len(wrong) - 1} more that differ" if len(wrong) > 1 else ""
        do = "train on logits, which models of other shapes have too: distill.logits"
        raise InputError([Problem(f"{twin.name}: '{first.name}'", f"the dense twin's {list(first.shape)}", f"{got}{more}", do)])


def _name(pass_: TrainPass | BlockTrainPass, source: Checkpoint) -> str | None:
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
