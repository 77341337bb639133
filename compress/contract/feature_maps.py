"""Feature maps: which layers and channels of a teacher a student's stand for.

Manifests tell which layers and hidden channels pruning has kept, as indices into the model that a lineage began with. So a
student is compared with any ancestor of it, or with a sibling that has kept more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compress.contract.rotating_pass import same_basis
from compress.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.checkpoint.manifest import Manifest
    from compress.checkpoint.reader import Checkpoint


class Maps(NamedTuple):
    """For each layer and hidden channel of a student the teacher's; empty where a student's are the teacher's own."""

    layers: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()


class Sizes(NamedTuple):
    """A model's number of layers, and its hidden channels."""

    layers: int
    channels: int


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """The sizes that a checkpoint's config names. Raises InputError."""
    from compress.architecture.model_class import model_class

    config = model_class(checkpoint)[1].get_text_config()
    layers, channels = (getattr(config, word, None) for word in ("num_hidden_layers", "hidden_size"))
    if not isinstance(layers, int) or not isinstance(channels, int):
        got = f"{type(config).__name__} without"
        raise InputError(checkpoint.name, "a config with num_hidden_layers and hidden_size", got, "use distill.logits")
    return Sizes(layers, channels)


def maps_of(student: Manifest | None, teacher: Manifest | None) -> Maps:
    """The maps that two manifests tell. Raises InputError for a teacher that lacks what the student has kept, or is rotated."""
    same_basis(student, teacher)
    return Maps(*(_places(_kept(student, word), _kept(teacher, word), word) for word in ("layers", "hidden")))


def _kept(manifest: Manifest | None, word: str) -> tuple[int, ...]:
    """What a lineage has kept of layers or hidden channels; empty for all."""
    kept = manifest.kept if manifest is not None else None
    if kept is None:
        return ()
    return kept.layers if word == "layers" else kept.hidden


def _places(student: tuple[int, ...], teacher: tuple[int, ...], word: str) -> tuple[int, ...]:
    if not teacher or student == teacher:
        return () if student == teacher else student
    place = {index: number for number, index in enumerate(teacher)}
    if not student or (lost := [index for index in student if index not in place]):
        got = f"{len(teacher)} {word}" + (f", without {', '.join(map(str, lost[:3]))}" if student else "")
        raise InputError("teacher", f"a teacher that has all {word} of the student", got, "name an ancestor of the student")
    return tuple(place[index] for index in student)


def compared(student: Checkpoint, teacher: Checkpoint) -> tuple[Maps, Sizes, Sizes]:
    """The full maps of two checkpoints, whose sizes fit, and both sizes. Raises InputError."""
    maps, own, theirs = maps_of(student.manifest, teacher.manifest), sizes_of(student), sizes_of(teacher)
    channels = _fitting(maps.channels, own.channels, theirs.channels, "hidden channels", teacher)
    return Maps(_fitting(maps.layers, own.layers, theirs.layers, "layers", teacher), channels), own, theirs


def _fitting(places: tuple[int, ...], own: int, theirs: int, word: str, teacher: Checkpoint) -> tuple[int, ...]:
    found = places or tuple(range(theirs))
    if len(found) != own or max(found) >= theirs:
        expected = f"{own} {word} as the student has, or a student whose manifest tells which it has kept of the teacher's"
        do = "use distill.features, which learns a map between them, or distill.logits"
        raise InputError(f"teacher {teacher.name}", expected, f"{theirs} {word}", do)
    return found


def selected(layers: Sequence[int], count: int, where: str) -> list[int]:
    """Chosen layers in order, counted from the end where negative; all if none is named. Raises InputError."""
    if odd := [layer for layer in layers if not -count <= layer < count]:
        expected = f"layers from 0 to {count - 1}, or from -{count} to -1"
        raise InputError(where, expected, ", ".join(map(str, odd)), "the output of layer 0 is the first block's")
    return sorted({layer % count for layer in layers}) or list(range(count))
