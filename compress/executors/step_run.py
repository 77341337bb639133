"""Step run: one step that is executed: what it reads, the writer that it fills."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.writer import Writer
from compress.context import Context
from compress.contract.pass_base import Pass
from compress.contract.step_plan import StepPlan
from compress.layerwise.dense_view import DenseView
from compress.spec.kept import Kept
from compress.spec.weight_state import Note, Weight

KEPT_FILE = ".kept.json"
"""In the .tmp of a slicing step, once it has decided."""

if TYPE_CHECKING:
    from compress.corpus import Corpus
    from compress.executors.dense_parent import DenseParent


@dataclass(frozen=True)
class StepRun:
    """What an executor needs of one step."""

    step: StepPlan
    source: Checkpoint
    weights: Sequence[Weight]
    """The weights to write; none for a step that only makes tokens."""
    digests: dict[str, str]
    """sha256 of `source`'s tensors."""
    writer: Writer
    ctx: Context
    tokens: Path | None = None
    """The file of the tokens that the step reads, if it reads any."""
    teacher: Checkpoint | None = None
    dense_parent: DenseParent | None = None
    """Reads dense weights for a CompensatingPass."""
    dense_view: DenseView | None = None
    """Reads a packed source for the pass that unpacks it."""
    notes: list[Note] = field(default_factory=list)
    """Counted lines that the executor adds about the step as a whole."""

    @property
    def kept(self) -> Kept | None:
        """Which parts of the source a slicing pass has kept; None before it has decided, and for other passes."""
        file = self.writer.path / KEPT_FILE
        return Kept.from_json(json.loads(file.read_text())) if file.is_file() else None

    @cached_property
    def pass_(self) -> Pass:
        """The pass that does the work."""
        return self.step.pass_.worker()

    @property
    def touched(self) -> list[Weight]:
        """The weights that the pass transforms."""
        names = set(self.step.transformed)
        return [weight for weight in self.weights if weight.name in names]

    @property
    def trained(self) -> list[Weight]:
        """The weights that a training pass learns: of the larger model, if it makes a smaller one."""
        return self.touched if self.step.cut is None else list(self.step.cut.trained)

    def untouched(self) -> StepRun:
        """The same run, limited to the weights that are copied unchanged."""
        names = set(self.step.transformed)
        return replace(self, weights=[weight for weight in self.weights if weight.name not in names])

    def corpus(self) -> Corpus:
        """The tokens that the step reads."""
        from compress.corpus import Corpus

        assert self.tokens is not None
        return Corpus.load(self.tokens)
