"""Build manifest: the manifest of a checkpoint that a step has written."""

from __future__ import annotations

import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.licence import licence_details, licence_of
from compress.checkpoint.manifest import Manifest, NoteRecord, Source, Step, WeightRecord
from compress.checkpoint.reader import README
from compress.checkpoint.remote_code import NOTE, code_notes
from compress.checkpoint.scan import SourceScan
from compress.contract.step_plan import Plan, StepPlan
from compress.device import device_of, name_of, peak_of
from compress.executors.step_run import StepRun
from compress.executors.teacher import Teacher
from compress.spec.weight_state import DENSE, Note

LASTING = (
    "skipped", "ragged", "nonfinite", "fallback", "unrouted", "damping", "clamped", "zero rows", "large error", "trained",
    "smoothed", "rotated", "untied", "sliced", "kv cache", "no kv cache", "default text", "domains", "repeated", "no loss",
    "left alone by default", "costs", NOTE,
)  # fmt: skip
"""Words of counted lines that still hold after later steps."""


@dataclass(frozen=True)
class Written:
    """Records of a finished step: lineage, journal entries by weight, digests of files, measurements."""

    lineage: tuple[Step, ...]
    entries: dict[str, dict[str, Any]]
    files: dict[str, str]
    measured: dict[str, Any]
    stages: tuple[dict[str, Any], ...]
    """What the steps before have measured."""
    plan: Plan


def build_manifest(
    run: StepRun, before: Manifest | None, scan: SourceScan, second_model: Teacher | None, written: Written
) -> Manifest:
    """The manifest of a step; `before` is the manifest of its source."""
    step, ctx, plan = run.step, run.ctx, written.plan
    measured = {
        **written.measured,
        "peak_resident_bytes": peak_resident_bytes(),
        **({"peak_device_bytes": found} if (found := peak_of(device_of(ctx))) else {}),
    }
    size = {} if step.inherits else {"bytes": step.payload_bytes, "bits": round(plan.bits(step), 4)}
    stage = {"id": written.lineage[-1].id, "name": step.name, **size, **measured}
    records, happened = _records(run, before, written.entries)
    renamed = _renamed(run)
    lasting = [note for note in (before.notes if before else ()) if note.what in LASTING]
    kept = [note for old in lasting if (note := _still(old, step, renamed)) is not None]
    notes = _notes(run, before, scan, second_model, happened)
    said = {(note.what, note.reason, note.names) for note in kept}
    new = [NoteRecord(what=n.what, reason=n.reason, count=n.count, names=n.names) for n in notes]
    return Manifest(
        compress_version=__version__,
        parent=written.lineage[-1].parent,
        source=before.source if before else _origin(run, scan),
        lineage=written.lineage,
        seed=ctx.seed,
        threads=ctx.threads,
        isa=isa(),
        device=name_of(device_of(ctx)) if step.device_bytes else before.device if before else "",
        format="tokens" if step.inherits else step.format.name if step.format else "canonical",
        coverage={"targeted": len(step.targeted), "transformed": len(step.transformed), "skipped": len(step.skipped)},
        weights=records,
        structure=_structure(run, before),
        notes=(*kept, *(note for note in new if (note.what, note.reason, note.names) not in said)),
        digests={name: digest for w in run.weights for name, digest in written.entries[w.name]["digests"].items()},
        files=written.files,
        measured={
            **measured,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "ranks": ctx.world_size,
            "source_bytes": before.measured.get("source_bytes", 0) if before else plan.source_bytes,
            "stages": [*written.stages, stage],
            **({"readers": [asdict(verdict) for verdict in plan.verdicts]} if step.format else {}),
        },
    ).sealed()


def _records(
    run: StepRun, before: Manifest | None, entries: dict[str, dict[str, Any]]
) -> tuple[dict[str, WeightRecord], list[Note]]:
    """A record for each weight that is not dense, and counted lines from the journal's notes."""
    step, records = run.step, {}
    happened: dict[tuple[str, str], list[str]] = {}
    for weight in run.weights:
        state, entry = step.after[weight.name], entries[weight.name]
        for what, reason in entry.get("notes", ()):
            happened.setdefault((what, reason), []).append(weight.name)
        if state == DENSE:
            continue
        old = before.weights.get(weight.name) if before else None
        errors = {
            name: None if (error := entry.get(name, getattr(old, name, None))) is None else round(error, 9)
            for name in ("error", "output_error")
        }
        records[weight.name] = WeightRecord(
            state=str(state), dtype=weight.dtype, shape=weight.shape, transposed=weight.transposed,
            bits=round(step.bits([weight]), 6), **errors,
        )  # fmt: skip
    return records, [Note(what, reason, tuple(names)) for (what, reason), names in happened.items()]


def _notes(
    run: StepRun, before: Manifest | None, scan: SourceScan, second_model: Teacher | None, happened: list[Note]
) -> list[Note]:
    """The counted lines of this step."""
    notes = [*run.step.notes, *happened, *run.notes]
    if scan.nonfinite and before is None:
        notes.append(Note("nonfinite", "NaN or Inf, allowed by --allow-nonfinite", scan.nonfinite))
    notes += code_notes(run.source, "model")
    return notes + (code_notes(second_model.checkpoint, "teacher") if second_model else [])


def _origin(run: StepRun, scan: SourceScan) -> Source:
    """The origin of the lineage: a source that has no manifest."""
    source = run.source
    readme = source.path / README
    licence, details = source.origin.get("licence") or licence_of(readme) or None, licence_details(readme)
    return Source(
        name=source.name, commit=source.origin.get("commit"), licence=licence, licence_name=details.get("name"),
        licence_link=details.get("link"),
        datasets=tuple(source.origin.get("datasets", ())), fingerprint=scan.fingerprint,
    )  # fmt: skip


def stages_of(manifest: Manifest | None) -> tuple[dict[str, Any], ...]:
    """What each step of a checkpoint's lineage has measured."""
    found = manifest.measured.get("stages", []) if manifest is not None else []
    return tuple(found) if isinstance(found, list) else ()


def _structure(run: StepRun, before: Manifest | None) -> dict[str, Any]:
    """What is left of the lineage's source after this step."""
    kept, earlier = run.kept, before.kept if before is not None else None
    if kept is None:
        return before.structure if before is not None else {}
    return (kept if earlier is None else kept.of(earlier)).to_json()


def _renamed(run: StepRun) -> dict[str, str] | None:
    """The names of tensors after a step by those before it; None if no step but this one's kind renames any."""
    cut, kept = run.step.cut, run.kept
    if cut is None or kept is None:
        return None
    return {part.source.name: part.name for part in cut.parts(kept)}


def _still(note: NoteRecord, step: StepPlan, renamed: dict[str, str] | None) -> NoteRecord | None:
    """An earlier step's counted line, without the weights whose errors this step has measured anew, or has left out."""
    names = note.names
    if renamed is not None and names and not renamed.keys().isdisjoint(names):
        names = tuple(renamed[name] for name in names if name in renamed)
    if note.what == "large error" and step.format is None:
        anew = set(step.transformed)
        names = tuple(name for name in names if name not in anew)
    if names == note.names:
        return note
    return note.model_copy(update={"names": names, "count": len(names)}) if names else None


@lru_cache(maxsize=1)
def isa() -> str:
    """The instruction set that torch's CPU kernels use; together with the thread count it decides rounding."""
    import torch

    return f"{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}"


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far.

    Not from `ru_maxrss`: on Linux it includes the parent process's peak, if that was larger.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
