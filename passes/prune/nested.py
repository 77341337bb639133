"""Sorts neurons and heads by importance: the first of them are a smaller model.

The order of neurons, of key-value heads with their query heads, and of hidden channels means nothing to a model: sorting changes
no logit. Afterwards `prune.slice` takes any prefix (MatFormer, Devvrit et al., 2310.07707; SortedNet, Valipour et al.,
2309.00255). Without training, half of it is as bad as `prune.width` at that size. Scores are those of `prune.width`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from compress.contract.slicing_pass import Fact, Observed, SlicingPass, Structure
from compress.spec.kept import Kept, KeptBlock, Sizes


class Nested(SlicingPass):
    """Sorts neurons and heads by importance, and leaves out none."""

    example: ClassVar[str] = "calibrate | prune.nested"

    sort_hidden: bool = Field(False, description="sort the channels of the residual stream, too")

    def resized(self, structure: Structure) -> Sizes:
        return structure.sizes

    def facts(self) -> tuple[Fact, ...]:
        return ("activations",)

    def keep(self, observed: Observed, before: Sizes, after: Sizes) -> Kept:
        kept, blocks = Kept.first(before, before), []
        for queries, units in zip(observed.queries, observed.units, strict=True):
            by_group = queries.view(before.groups, before.share)
            groups = tuple(by_group.square().sum(1).argsort(descending=True, stable=True).tolist())
            inside = by_group.argsort(dim=1, descending=True, stable=True).tolist()
            ordered = tuple(group * before.share + query for group in groups for query in inside[group])
            sorted_units = {n: tuple(scores.argsort(descending=True, stable=True).tolist()) for n, scores in units.items()}
            blocks.append(KeptBlock(groups, ordered, sorted_units, tuple(range(before.experts))))
        hidden = kept.hidden
        if self.sort_hidden:
            assert observed.hidden is not None
            hidden = tuple(observed.hidden.argsort(descending=True, stable=True).tolist())
        return replace(kept, hidden=hidden, blocks=tuple(blocks))
