"""Leaves out whole layers, those that change the hidden states or the loss least.

    influence   1 - mean cosine of a layer's input and output (ShortGPT, Men et al., 2403.03853); one forward
    loss        cross entropy of the calibration tokens without the layer; a forward for each layer

Perplexity and influence rank layers alike; generation suffers most (reference: Minitron, 2407.14679). Layers are numbered anew,
and lists of the config that have an entry for each layer are cut along.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from compress.contract.slicing_pass import Fact, Observed, SlicingPass, Structure
from compress.errors import Refusal
from compress.spec.kept import Kept, Sizes


class Depth(SlicingPass):
    """Leaves out the layers that matter least."""

    example: ClassVar[str] = "calibrate | prune.depth(layers=1)"

    layers: int = Field(ge=1, description="how many layers are kept")
    by: Literal["influence", "loss"] = Field("influence", description="what a layer's score is: see above")
    contiguous: bool = Field(False, description="leave out layers that follow each other")

    def resized(self, structure: Structure) -> Sizes:
        if self.layers >= structure.sizes.layers:
            raise Refusal(f"layers={self.layers}, and the model has {structure.sizes.layers}", "keep fewer")
        return replace(structure.sizes, layers=self.layers)

    def facts(self) -> tuple[Fact, ...]:
        return (self.by,)

    def keep(self, observed: Observed, before: Sizes, after: Sizes) -> Kept:
        scores = observed.influence or [loss - observed.loss[-1] for loss in observed.loss[:-1]]
        every = range(before.layers)
        drop = before.layers - after.layers
        if self.contiguous:
            first = min(range(after.layers + 1), key=lambda start: sum(scores[start : start + drop]))
            dropped = set(range(first, first + drop))
        else:
            dropped = set(sorted(every, key=lambda layer: scores[layer])[:drop])
        kept = Kept.first(after, before)
        return replace(kept, layers=tuple(layer for layer in every if layer not in dropped))
