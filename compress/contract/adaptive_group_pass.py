"""Adaptive group pass: a quantizer that can choose a group for each matrix.

Kim et al., 2308.09723: begin with one scale per row, halve the groups as long as ranges shrink. The printed rule goes on
while for any group new/old > alpha, which for ranges of magnitudes is always so (one half keeps the largest weight and has
a ratio of 1), and so always ends at the smallest group. What it means to say, that finer groups have to earn their scales,
is here by default: go on while the mean of new/old is *below* alpha, that is while rounding gets finer by 1 - alpha on
average. Rows of a Gaussian have a mean of 0.95 at 4,096 columns and 0.92 at 128, so that the default divides what has
outliers and leaves the rest. `some` goes on while one group gains that much; `paper` is the printed rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.allocator import Allocator, Offer, Rest
from compress.contract.base_passes import QuantizingPass
from compress.contract.fused_groups import together
from compress.spec.weight_state import Note, State, Weight

if TYPE_CHECKING:
    import torch


class AdaptiveGroupPass(QuantizingPass):
    """Makes codes in groups that are given, or that each matrix chooses by its own values."""

    granularity: Literal["fixed", "adaptive"] = Field(
        "fixed", description="the scheme's group everywhere; or for each matrix its own: one scale per row, halved down to that"
    )
    alpha: float = Field(
        0.9, gt=0, le=1, description="adaptive: groups are halved while their ranges, new to old, are below this share"
    )
    rule: Literal["mean", "some", "paper"] = Field(
        "mean", description="adaptive: the mean over groups is below alpha, or that of some group; or the paper's any above alpha"
    )
    share: Literal["readers", "none"] = Field(
        "readers", description="adaptive: what readers want alike (q, k, v; gate, up; all experts) takes their finest, or none do"
    )

    @model_validator(mode="after")
    def _adaptive(self) -> Self:
        if self.granularity == "fixed":
            fields = type(self).model_fields
            if given := [name for name in ("alpha", "rule", "share") if getattr(self, name) != fields[name].default]:
                raise ValueError(f"{', '.join(given)}: only with granularity=adaptive")
        elif self.scheme.group is None or self.scheme.scales != "row":
            raise ValueError("adaptive: a scheme with the smallest group, and scales of its rows, e.g. w4a16g64")
        elif self.ragged != "refuse":
            raise ValueError("ragged: only with granularity=fixed, for adaptive groups divide the columns")
        return self

    def allocator(self) -> Allocator | None:
        return AdaptiveGroups(self) if self.granularity == "adaptive" else None

    def becomes(self, weight: Weight, state: State) -> State:
        allocator = self.allocator()
        return super().becomes(weight, state) if allocator is None else allocator.largest(weight, state)

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        return super().notes(weights, states) if self.granularity == "fixed" else []


class AdaptiveGroups(Allocator):
    """Chooses the group of each matrix by the ranges of its groups."""

    gradients: ClassVar[bool] = False

    def __init__(self, pass_: AdaptiveGroupPass) -> None:
        self.pass_ = pass_
        assert pass_.scheme.group is not None
        self.least = pass_.scheme.group
        """Columns of the smallest group."""

    def offers(self, weight: Weight, state: State) -> tuple[State, ...]:
        """One scale per row, its halvings, and last the scheme's group, for those that have to be alike and halve otherwise."""
        from compress.numerics.granularity import widths

        whole = replace(self.pass_.scheme, group=None)
        state = self.pass_.coded(weight, state, whole)
        finer = widths(weight.columns, self.least)[1:]
        if weight.columns % self.least == 0 and self.least < weight.columns and self.least not in finer:
            finer.append(self.least)
        return state, *(replace(state, scheme=replace(whole, group=group)) for group in finer)

    def costs(self, offer: Offer, value: torch.Tensor, gradient: torch.Tensor | None) -> tuple[float, ...]:
        """What the rule looks at for each halving: ranges of the new groups to those of the old."""
        from compress.numerics.granularity import halvings, widths
        from compress.numerics.outliers import split

        if (outliers := offer.states[0].outliers) is not None:
            value = split(value, outliers)[0]
        found = halvings(value, widths(offer.weight.columns, self.least), self.pass_.scheme.symmetric)
        return tuple({"mean": step.mean, "some": step.least, "paper": step.most}[self.pass_.rule] for step in found)

    def decide(self, offers: Sequence[Offer], rest: Rest) -> dict[str, State]:
        found = {offer.weight.name: offer.states[self._halvings(offer)] for offer in offers}
        companies: dict[str, list[Offer]] = defaultdict(list)
        for offer in offers if self.pass_.share == "readers" else ():
            companies["experts" if offer.weight.kind == "expert" else together(offer.weight.name)].append(offer)
        for company in companies.values():
            by_group = [{_group(state): state for state in offer.states[1:]} for offer in company]
            finest = min((group for offer in company if (group := _group(found[offer.weight.name]))), default=0)
            common = [group for group in by_group[0] if group <= finest and all(group in own for own in by_group)]
            for offer, own in zip(company, by_group, strict=True) if common else ():
                found[offer.weight.name] = own[max(common)]
        return found

    def _halvings(self, offer: Offer) -> int:
        """How often the groups of a matrix are halved."""
        alpha = self.pass_.alpha
        for number, ratio in enumerate(offer.costs):
            if (ratio <= alpha) if self.pass_.rule == "paper" else (ratio >= alpha):
                return number
        return len(offer.costs)


def _group(state: State) -> int:
    """Columns that share a scale; 0 for one scale per row."""
    assert state.scheme is not None
    return state.scheme.group or 0
