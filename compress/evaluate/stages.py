"""Stages: every checkpoint that a run made, measured against its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.errors import InputError
from compress.evaluate.perplexity_kl import Estimate, Quality, compare
from compress.numerics import qtensor
from compress.pipeline.output_paths import steps_folder
from compress.pipeline.run import Result
from compress.plots import Stage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measured:
    """One checkpoint of a run: its size, its quality, and the time that it took."""

    name: str
    """Name of the pass that made it; `source` for the source itself."""
    nbytes: int
    """Of its tensors."""
    bits: float
    """Bits per weight, scales and padding included, over the weights that the run prunes or quantizes."""
    perplexity: Estimate
    quality: Quality | None = None
    """Its quality against the source; None for the source itself."""
    seconds: float | None = None
    """Time of the step that made it."""

    @property
    def kl(self) -> float:
        """KL(source || this) in nats per token."""
        return self.quality.kl.value if self.quality is not None else 0.0

    def drawn(self, name: str) -> Stage:
        """This stage as a bar of the picture."""
        kl, error = (None, None) if self.quality is None else (self.kl, self.quality.kl.error)
        return Stage(name, self.nbytes, self.bits, self.perplexity.value, kl, error)


def place_of(result: Result, pass_name: str) -> Path:
    """The directory of the last step that `pass_name` made in a run. Raises InputError if it was removed."""
    return _places(result)[max(i for i, step in enumerate(result.plan.steps) if step.name == pass_name)]


def _places(result: Result) -> list[Path]:
    """The directory of each step. Raises InputError if steps were removed."""
    steps, folder = result.plan.steps, steps_folder(result.out)
    lines = result.manifest.lineage[-len(steps) :]
    kept = [folder / f"{step.number}-{step.name}-{line.id[:8]}" for step, line in zip(steps, lines, strict=True)]
    for place in (places := [*kept[:-1], result.out]):
        if not place.is_dir():
            raise InputError(str(place), "a step that the run has kept", "none", f"remove {result.out} and run again")
    return places


def measure_stages(result: Result, source: Checkpoint, windows: torch.Tensor) -> list[Measured]:
    """Measures the run's source and every checkpoint that it made on `windows` [count, length], against `source`.

    A step that writes no weights, such as calibration, is no stage. Raises CompressError.
    """
    plan, touched = result.plan, list(result.manifest.weights)
    stages = []
    for step, place in zip(plan.steps, _places(result), strict=True):
        if step.inherits:
            continue
        manifest = Manifest.read(place)
        assert manifest is not None
        quality = compare(source, open_checkpoint(place, trusted=source.trusted), windows)
        bits, seconds = plan.bits(step, touched), float(manifest.measured["seconds"])
        stages.append(Measured(step.name, step.payload_bytes, bits, quality.perplexity, quality, seconds))
    assert stages, "a run that changes no weights has no stages"
    first, before = stages[0].quality, plan.steps[0].before
    assert first is not None
    weights = [weight for weight in plan.model.weights if weight.name in touched and weight.name in before]
    nbytes = sum(qtensor.stored_bytes(weight, before[weight.name]) for weight in weights)
    bits = nbytes * 8 / max(1, sum(weight.numel for weight in weights))
    return [Measured("source", plan.source_bytes, bits, first.source_perplexity), *stages]
