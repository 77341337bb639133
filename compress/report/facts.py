"""Facts: what the card and the report say of an artifact.

They come from its manifest, its records and the steps that are kept. Nothing is measured here, and no weight is
read. What was not measured is absent, and whoever shows the facts says so. Everything comes from files that anybody may have
written, so numbers are checked to be numbers, and texts are left for card and report to escape.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.checkpoint.manifest import Manifest, NoteRecord, WeightRecord
from compress.checkpoint.reader import ALLOCATION, TRAINING, Checkpoint, open_checkpoint
from compress.errors import InputError
from compress.evaluate.records import QualityRecord, ReaderRecord, TaskRecord, evaluation, verification
from compress.pipeline.output_paths import steps_folder
from compress.spec.weight_state import State

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_MOST_ROWS = 100_000
"""Lines of a record of training that are read."""


@dataclass(frozen=True)
class Layer:
    """One weight that a pass has changed."""

    name: str
    row: str
    """Its name with a star for the number of its block, and of its expert."""
    block: int | None
    state: State
    bits: float
    numel: int
    error: float | None
    output_error: float | None

    @property
    def zeros(self) -> float | None:
        """Share of zeros that its state promises; None for none."""
        return self.state.sparsity.fraction if self.state.sparsity is not None else None


@dataclass(frozen=True)
class Stage:
    """One step of the lineage: its size, its cost and its quality, as far as they are known."""

    id: str
    name: str
    text: str
    inputs: dict[str, str]
    nbytes: int | None = None
    """Of its tensors; None for a step that writes none."""
    bits: float | None = None
    """Per weight, over all weights of the model."""
    seconds: float | None = None
    peak_bytes: int | None = None
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds of each kind of work."""
    quality: tuple[QualityRecord, ...] = ()


@dataclass(frozen=True)
class ReaderFacts:
    """One reader: what was expected when the artifact was packed, and what `verify` found."""

    name: str
    expected: str
    reason: str
    record: ReaderRecord | None = None

    @property
    def usable(self) -> bool:
        """Whether it loads the artifact: as verified, or where it was not, as expected."""
        return self.record.passed if self.record is not None else self.expected == "yes"


@dataclass(frozen=True)
class Facts:
    """All that is known of an artifact."""

    name: str
    """Of its directory."""
    manifest: Manifest
    config: dict[str, Any]
    nbytes: int
    """Of its tensors."""
    source_bytes: int
    """Of the tensors of the lineage's source; 0 where that is not known."""
    stages: tuple[Stage, ...]
    layers: tuple[Layer, ...]
    readers: tuple[ReaderFacts, ...]
    tasks: tuple[TaskRecord, ...]
    training: dict[str, list[dict[str, Any]]]
    """The record of each training step that is kept."""
    allocations: dict[str, list[dict[str, Any]]]
    """The decisions of each allocator whose step is kept."""
    tokenizer: bool

    @property
    def quality(self) -> tuple[QualityRecord, ...]:
        """What was measured of the artifact itself."""
        return self.stages[-1].quality

    @property
    def verified(self) -> list[ReaderFacts]:
        """The readers that compute what these bytes mean, as `verify` has found."""
        return [reader for reader in self.readers if reader.record is not None and reader.record.passed]

    @property
    def notes(self) -> list[NoteRecord]:
        """Counted lines that tell of a deviation from what was asked."""
        return [note for note in self.manifest.notes if note.what != "untouched"]

    @property
    def base(self) -> str:
        """The id of the lineage's source on the Hub; empty for a directory."""
        source = self.manifest.source
        return source.name.partition("@")[0] if source.commit and _HUB_ID.fullmatch(source.name.partition("@")[0]) else ""

    @property
    def recipe(self) -> str:
        """All steps as one line."""
        return " | ".join(stage.text for stage in self.stages)

    @property
    def architecture(self) -> str:
        """The class of transformers that config.json names; empty for none that can be a name."""
        named = self.config.get("architectures")
        name = named[0] if isinstance(named, list) and named else None
        return name if isinstance(name, str) and name.isidentifier() and name.isascii() else ""

    @property
    def bits(self) -> float | None:
        """Bits per weight of the layers, as stored."""
        numel = sum(layer.numel for layer in self.layers)
        return sum(layer.bits * layer.numel for layer in self.layers) / numel if numel else None

    @property
    def datasets(self) -> list[str]:
        """Ids on the Hub of the texts that steps have read."""
        found = []
        for step in self.manifest.lineage:
            data = step.options.get("data")
            for text in data if isinstance(data, list) else [data]:
                name = (
                    re.split(r"[@:\[?#]", text.removeprefix("hf:"))[0] if isinstance(text, str) and text.startswith("hf:") else ""
                )
                found += [name] if _HUB_ID.fullmatch(name) else []
        return list(dict.fromkeys(found))


def read_facts(directory: Path) -> Facts:
    """The facts of an artifact. Raises InputError for a directory that compress did not make."""
    checkpoint = open_checkpoint(directory)
    try:
        return facts_of(checkpoint)
    finally:
        checkpoint.close()


def facts_of(checkpoint: Checkpoint) -> Facts:
    """The facts of an open artifact. Raises InputError for one without a manifest."""
    manifest, directory = checkpoint.manifest, checkpoint.path
    if manifest is None:
        do = "run a recipe on it, and name what that makes"
        raise InputError(str(directory), "a checkpoint that compress made (manifest.json)", "one without", do)
    measured = evaluation(directory, manifest.fingerprint)
    places = _places(directory, manifest)
    return Facts(
        name=directory.resolve().name,
        manifest=manifest,
        config=checkpoint.config,
        nbytes=checkpoint.nbytes,
        source_bytes=int(_number(manifest.measured.get("source_bytes")) or 0),
        stages=tuple(_stages(manifest, checkpoint.nbytes, measured.quality if measured is not None else ())),
        layers=tuple(_layer(name, record) for name, record in manifest.weights.items()),
        readers=tuple(_readers(manifest, directory)),
        tasks=measured.tasks if measured is not None else (),
        training=dict(_rows(places, TRAINING[0], {"step": int})),
        allocations=dict(_rows(places, ALLOCATION[0], {"weight": str, "state": str})),
        tokenizer="tokenizer_config.json" in manifest.files,
    )


def _stages(manifest: Manifest, nbytes: int, quality: tuple[QualityRecord, ...]) -> Iterator[Stage]:
    told = manifest.measured.get("stages")
    known = {one.get("id"): one for one in told if isinstance(one, dict)} if isinstance(told, list) else {}
    for number, step in enumerate(manifest.lineage, start=1):
        one = known.get(step.id, {})
        size, peak, spent = _number(one.get("bytes")), _number(one.get("peak_resident_bytes")), one.get("spent")
        if number == len(manifest.lineage):
            size = nbytes
        yield Stage(
            step.id, step.text.partition("(")[0], step.text, dict(step.inputs), None if size is None else int(size),
            _number(one.get("bits")), _number(one.get("seconds")), None if peak is None else int(peak),
            {str(word): found for word, value in spent.items() if (found := _number(value)) is not None}
            if isinstance(spent, dict) else {},
            tuple(record for record in quality if record.step == step.id),
        )  # fmt: skip


def _layer(name: str, record: WeightRecord) -> Layer:
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    row = re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight"))
    return Layer(
        name, row, int(numbers[0]) if numbers and len(numbers[0]) < 7 else None, State.parse(record.state), record.bits,
        math.prod(record.shape), record.error, record.output_error,
    )  # fmt: skip


def _readers(manifest: Manifest, directory: Path) -> Iterator[ReaderFacts]:
    """Readers that a format's own code knows of, then others that were verified."""
    checked = verification(directory, manifest.fingerprint)
    records = dict(checked.readers) if checked is not None else {}
    told = manifest.measured.get("readers")
    for one in told if isinstance(told, list) else ():
        name, loads, reason = (one.get(word) if isinstance(one, dict) else None for word in ("reader", "loads", "reason"))
        if isinstance(name, str) and isinstance(loads, str) and isinstance(reason, str):
            yield ReaderFacts(name, loads, reason, records.pop(name, None))
    for other, record in records.items():
        yield ReaderFacts(other, "unknown", "", record)


def _places(directory: Path, manifest: Manifest) -> dict[str, Path]:
    """The directories of the lineage's steps that are kept, by what each is called, in order."""
    folder, found = steps_folder(directory), {manifest.lineage[-1].id: directory}
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            made = Manifest.read(place) if place.is_dir() else None
        except InputError:
            continue
        if made is not None:
            found.setdefault(made.lineage[-1].id, place)
    steps = enumerate(manifest.lineage, start=1)
    return {f"{number}. {step.text.partition('(')[0]}": found[step.id] for number, step in steps if step.id in found}


def _rows(places: dict[str, Path], file: str, words: dict[str, type]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The lines of JSON in a file of each step that has it; lines without what is needed are left out."""
    for label, place in places.items():
        if not (place / file).is_file():
            continue
        rows: list[dict[str, Any]] = []
        for line in (place / file).read_text(encoding="utf-8", errors="replace").splitlines()[:_MOST_ROWS]:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and all(isinstance(row.get(word), kind) for word, kind in words.items()):
                rows.append(row)
        if rows:
            yield label, rows


def _number(value: Any) -> float | None:
    """A finite number that is not negative; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)
