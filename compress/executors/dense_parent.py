"""Dense parent: the dense weights that codes were made from.

For a weight that this run has quantized, it is the weight that the quantizing step read, pruned and trained as it was then. For
one that the source already had in codes, it comes from the checkpoint that the pass names, or else from the model of the Hub
that the manifest names; either must be in the lineage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.scan import scan_source
from compress.checkpoint.source import open_source
from compress.context import Context
from compress.contract.notes import changed_by
from compress.contract.rotating_pass import rotated_by
from compress.contract.shapes import CompensatingPass
from compress.contract.step_plan import Plan, StepPlan
from compress.errors import InputError, UsageError
from compress.executors.teacher import Teacher
from compress.numerics.qtensor import as_matrix
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    import torch


class DenseParent:
    """Reads the dense weights for a step. `past` are the checkpoints that the steps up to it read, in order."""

    def __init__(self, step: StepPlan, plan: Plan, past: Sequence[Checkpoint], outside: Teacher | None) -> None:
        self._homes: dict[str, Checkpoint] = {}
        shapes = {weight.name: weight.shape for weight in step.weights}
        for name in step.transformed:
            made = _last_dense(name, step, plan)
            if made is None and (outside is None or not _has(outside.checkpoint, name, shapes[name], past[-1])):
                continue
            self._homes[name] = past[made] if made is not None else outside.checkpoint  # type: ignore[union-attr]
            # Opens the file before threads share it.
            self._homes[name].descriptor(self._homes[name].refs[name].file)

    def find(self, weight: Weight) -> torch.Tensor | None:
        """A weight as `read` returns it; None if only its codes are known."""
        return self.read(weight) if weight.name in self._homes else None

    def read(self, weight: Weight) -> torch.Tensor:
        """A weight as [experts?, rows, columns], in its dtype."""
        return as_matrix(weight, self._homes[weight.name].read(weight.name))


def _has(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], source: Checkpoint) -> bool:
    """Whether a checkpoint has the dense weight, of this shape, of a source's codes; a teacher may be another model."""
    entry = checkpoint.logical.get(name)
    alike = entry is not None and entry.state.scheme is None and entry.shape == shape
    return alike and rotated_by(checkpoint.manifest) == rotated_by(source.manifest)


def _last_dense(name: str, step: StepPlan, plan: Plan) -> int | None:
    """The last earlier step that read a weight without codes; None if all of them read codes."""
    before = range(step.number - 1)
    return next((number for number in reversed(before) if plan.steps[number].before[name].scheme is None), None)


def open_dense_parent(step: StepPlan, plan: Plan, source: Checkpoint, ctx: Context) -> Teacher | None:
    """The dense model of a source in codes; None if this run has quantized all weights itself. Raises CompressError."""
    assert isinstance(step.pass_, CompensatingPass)
    lost = [name for name in step.transformed if _last_dense(name, step, plan) is None]
    name, where = step.pass_.dense, f"{step.name}.dense"
    if not lost:
        if name:
            raise UsageError(where, "nothing, for this run reads the dense weights itself", name, "leave it out")
        return None
    manifest = source.manifest
    if not name:
        origin = manifest.source if manifest is not None else None
        changed = manifest is not None and (manifest.structure or changed_by(manifest.notes))
        if origin is None or not origin.commit or changed:
            got = "no manifest, or one that tells no model of the Hub that they were made from directly"
            raise InputError(f"'{lost[0]}'", "the dense weights that its codes were made from", got, f"set {where} to them")
        name = f"{origin.name}@{origin.commit}"
    found = open_source(name)
    quiet = replace(ctx, events=lambda event: None)
    fingerprint: str = ctx.broadcast(scan_source(found, quiet).fingerprint if ctx.is_main else None)
    if manifest is not None and fingerprint not in {manifest.source.fingerprint, *(line.parent for line in manifest.lineage)}:
        raise InputError(where, "a checkpoint that the lineage of the codes names", f"{found.name}, another one")
    if rotated_by(found.manifest) != rotated_by(manifest):
        got, do = f"{found.name}, which they were before quantize.rotate", "name the output of quantize.rotate"
        raise InputError(where, "the dense weights that the codes were made from", got, do)
    for weight in lost:
        entry, shape = found.logical.get(weight), source.logical[weight].shape if weight in source.logical else None
        if entry is None or entry.state.scheme is not None or entry.shape != shape:
            got = "none" if entry is None else f"{entry.state} {list(entry.shape)}"
            raise InputError(f"{found.name}: '{weight}'", "the dense weight that the codes were made from", got)
    return Teacher(found, fingerprint)
