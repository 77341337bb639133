"""Notes: the counted lines of a plan, and problems joined by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.architecture.unused import further_tokens
from compress.architecture.weight_map import Model
from compress.checkpoint.manifest import NoteRecord
from compress.checkpoint.reader import ABOUT, Checkpoint
from compress.errors import Problem, few
from compress.spec.weight_state import DENSE, UNREACHED, Note, State, Weight, counted

_TOWERS = "towers and what joins them to the text model: they pass through byte for byte"


def trained_by(notes: Sequence[Note | NoteRecord]) -> set[str]:
    """The weights that a training pass has changed, by its counted lines."""
    return {name for note in notes if note.what == "trained" for name in note.names}


def changed_by(notes: Sequence[Note | NoteRecord]) -> set[str]:
    """The weights that stay plain tensors but have other values, by counted lines."""
    return {name for note in notes if note.what in ("trained", "smoothed", "rotated") for name in note.names}


def untouched(weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
    """Counted lines for the weights that stay dense: towers in one, all others by kind and stack."""
    reasons = {}
    for weight in weights:
        if states[weight.name] == DENSE and weight.kind != "cache":
            place = f" of {weight.stack}" if weight.stack else ""
            reasons[weight.name] = _TOWERS if weight.unlearned == UNREACHED else f"{weight.kind}{place}"
    return counted("untouched", reasons)


def shared_notes(checkpoint: Checkpoint, model: Model, dropped: frozenset[str]) -> list[Note]:
    """Counted lines that are the same for every step over a checkpoint."""
    notes: list[Note] = []
    reasons = dict.fromkeys(model.unused, "tensors that the model does not take; carried along")
    mtp = "layers that predict further tokens (MTP), which transformers does not take with the model; carried along as they are"
    notes += counted("unused", reasons | dict.fromkeys(further_tokens(model), mtp))
    for alias in sorted(dropped):
        notes.append(Note("tied", f"the same tensor as {model.duplicates[alias]}; written once", (alias,)))
    if checkpoint.left_behind:
        notes.append(Note("left behind", "files of other kinds, and folders", checkpoint.left_behind))
    if checkpoint.manifest is None and (about := tuple(name for name in ABOUT if name in checkpoint.side_files)):
        notes.append(Note("left behind", "about the source: its numbers do not hold for the output", about))
    return notes


def folded(problems: list[Problem]) -> list[Problem]:
    """Joins problems with the same reason into one that names the first weights and counts the rest."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        place, _, name = problem.where.rpartition(": ")
        groups.setdefault((place, problem.got, problem.do), []).append(name)
    return [Problem(f"{place}: {few(names)}", "", got, do) for (place, got, do), names in groups.items()]


def unmeasured(weights: Sequence[Weight], before: Mapping[str, State], after: Mapping[str, State]) -> list[Note]:
    """Counts weights that a pass without tokens gives codes, and whose inputs share a number that should be measured."""
    made = {weight.name: after[weight.name].scheme for weight in weights if before[weight.name].scheme is None}
    said = "nothing measured its inputs: what divides their scales in {} is 1"
    named = {name: said.format(scheme) for name, scheme in made.items() if scheme is not None and scheme.input_divisor}
    return counted("uncalibrated", named)
