"""Build manifest: what a step has done, as the manifest of what it made."""

from __future__ import annotations

import platform
import resource
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.manifest import Manifest, NoteRecord, Source, Step, WeightRecord
from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.remote_code import NOTE, code_notes
from compress.checkpoint.scan import SourceScan
from compress.context import Context
from compress.contract.step_plan import StepPlan
from compress.device import device_of, name_of, peak_of
from compress.spec.weight_state import DENSE, Note, Weight

LASTING = (
    "skipped", "ragged", "nonfinite", "fallback", "unrouted", "damping", "clamped", "zero rows", "large error", "trained",
    "smoothed", "default text", NOTE,
)  # fmt: skip
"""Counted lines that stay true of a checkpoint through later steps."""


def account(
    step: StepPlan, weights: list[Weight], source: Checkpoint, before: Manifest | None, lineage: tuple[Step, ...],
    scan: SourceScan, teacher: Checkpoint | None, entries: dict[str, dict[str, Any]], files: dict[str, str],
    measured: dict[str, Any], ctx: Context,
) -> Manifest:  # fmt: skip
    """The manifest of a step that read `source`, whose manifest is `before`; `entries` are the journal's, by weight."""
    records: dict[str, WeightRecord] = {}
    happened: dict[tuple[str, str], list[str]] = {}
    for weight in weights:
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
    digests = {name: digest for w in weights for name, digest in entries[w.name]["digests"].items()}
    origin = Source(
        name=source.name, commit=source.origin.get("commit"), licence=source.origin.get("licence"),
        datasets=tuple(source.origin.get("datasets", ())), fingerprint=scan.fingerprint,
    )  # fmt: skip
    notes = [*step.notes, *(Note(what, reason, tuple(names)) for (what, reason), names in happened.items())]
    if scan.nonfinite and before is None:
        notes.append(Note("nonfinite", "NaN or Inf, allowed by --allow-nonfinite", scan.nonfinite))
    kept = [note for n in (before.notes if before else ()) if n.what in LASTING and (note := _still(n, step)) is not None]
    said = {(note.what, note.reason, note.names) for note in kept}
    notes += code_notes(source, "model") + (code_notes(teacher, "teacher") if teacher else [])
    notes = [note for note in notes if (note.what, note.reason, note.names) not in said]
    return Manifest(
        compress_version=__version__,
        parent=lineage[-1].parent,
        source=before.source if before else origin,
        lineage=lineage,
        seed=ctx.seed,
        threads=ctx.threads,
        isa=isa(),
        device=name_of(device_of(ctx)) if step.device_bytes else before.device if before else "",
        format="tokens" if step.inherits else step.format.name if step.format else "canonical",
        coverage={"targeted": len(step.targeted), "transformed": len(step.transformed), "skipped": len(step.skipped)},
        weights=records,
        notes=(*kept, *(NoteRecord(what=n.what, reason=n.reason, count=n.count, names=n.names) for n in notes)),
        digests=digests,
        files=files,
        measured={
            **measured,
            "peak_resident_bytes": peak_resident_bytes(),
            **({"peak_device_bytes": found} if (found := peak_of(device_of(ctx))) else {}),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "ranks": ctx.world_size,
        },
    ).sealed()


def _still(note: NoteRecord, step: StepPlan) -> NoteRecord | None:
    """What is left of an earlier step's counted line: an error of a weight that is made anew is told anew."""
    if note.what != "large error" or step.format is not None:
        return note
    names = tuple(name for name in note.names if name not in set(step.transformed))
    return note.model_copy(update={"names": names, "count": len(names)}) if names else None


@lru_cache(maxsize=1)
def isa() -> str:
    """The instruction set that torch's CPU kernels use; together with the thread count it decides rounding."""
    import torch

    return f"{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}"


def peak_resident_bytes() -> int:
    """The most memory this process has had resident so far.

    Linux's `ru_maxrss` would count the process that started this one, too, if that was the larger.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
