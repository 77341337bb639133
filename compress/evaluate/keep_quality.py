"""Keep quality: what `eval` has measured, written into the artifact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.checkpoint.scan import file_digest, scan_source
from compress.context import Context
from compress.errors import InputError, MachineError
from compress.evaluate.perplexity_kl import Estimate, Quality
from compress.evaluate.records import Number, QualityRecord, TaskRecord, keep_quality, keep_tasks, now
from compress.pipeline.output_paths import steps_folder


def kept_steps(artifact: Checkpoint) -> list[Checkpoint]:
    """The steps with weights that an artifact was made by, in order. Raises InputError where none is kept."""
    folder, manifest = steps_folder(artifact.path), artifact.manifest
    found: dict[str, Path] = {}
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        made = Manifest.read(place) if place.is_dir() else None
        if made is not None and made.format != "tokens":
            found[made.lineage[-1].id] = place
    before = [step.id for step in manifest.lineage[:-1]] if manifest is not None else []
    if not (places := [found[one] for one in before if one in found]):
        do = "leave --stages out, or make the artifact without --no-keep"
        raise InputError(str(folder), "steps that the run has kept", "none with weights", do)
    return [open_checkpoint(place, trusted=artifact.trusted) for place in places]


def records_of(
    measured: Sequence[Checkpoint], qualities: Sequence[Quality], source: Checkpoint | None, data: str | None, device: str
) -> list[QualityRecord]:
    """The records of checkpoints that `compare` has measured on a text; none for checkpoints without a manifest."""
    against = source.name if source is not None else ""
    pairs = zip(measured, qualities, strict=True) if data is not None and qualities else ()
    return [_record(one, quality, against, Path(data or ""), device) for one, quality in pairs if one.manifest is not None]


def keep(measured: Sequence[Checkpoint], rows: list[QualityRecord], tasks: list[TaskRecord]) -> tuple[str, str]:
    """Writes down what was found of an artifact, the last of `measured`, and of steps before it: (where, why not)."""
    artifact = measured[-1]
    if artifact.manifest is None:
        return "", "no manifest.json tells which bytes were measured"
    try:
        for checkpoint in measured:
            scan_source(checkpoint, Context(), allow_nonfinite=True)
        place, fingerprint = artifact.path, artifact.manifest.fingerprint
        found = [keep_quality(place, fingerprint, rows)] if rows else []
        found += [keep_tasks(place, fingerprint, tasks)] if tasks else []
        return str(found[-1]), ""
    except (InputError, MachineError) as error:
        problem = error.problems[0]
        return "", f"{problem.where}: {problem.got}"


def _record(checkpoint: Checkpoint, quality: Quality, against: str, data: Path, device: str) -> QualityRecord:
    assert checkpoint.manifest is not None
    return QualityRecord(
        step=checkpoint.manifest.lineage[-1].id, against=against, data=data.name, data_sha256=file_digest(data),
        tokens=quality.tokens, length=quality.length, scored=quality.scored, protocol=quality.protocol, device=device,
        source_perplexity=_number(quality.source_perplexity), perplexity=_number(quality.perplexity), kl=_number(quality.kl),
        kl_median=_number(quality.kl_median), kl_p99=_number(quality.kl_p99), top1=_number(quality.top1), spread=quality.spread,
        when=now(),
    )  # fmt: skip


def _number(estimate: Estimate) -> Number:
    return Number(**{name: value if math.isfinite(value) else None for name, value in asdict(estimate).items()})
