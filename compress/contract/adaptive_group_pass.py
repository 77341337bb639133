"""Adaptive group pass: a quantizer that can choose a group size for each matrix.

Kim et al., 2308.09723: begin with one scale per row, and halve the groups as long as their ranges shrink. The printed rule goes
on while new/old > alpha for any group. For ranges of magnitudes that always holds (one half keeps the largest weight, so its
ratio is 1), so the printed rule always ends at the smallest group. The default here is the rule that the text describes: go on
while the mean of new/old is *below* alpha, that is, while rounding gets finer by at least 1 - alpha on average. Gaussian rows
have a mean of 0.95 at 4,096 columns and of 0.92 at 128, so the default halves the groups of matrices with outliers and leaves
the others. `some` goes on while at least one group gains that much; `paper` is the printed rule.
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
    """Makes codes with the scheme's group size, or with one that is chosen for each matrix by its values."""

    granularity: Literal["fixed", "adaptive"] = Field(
        "fixed", description="the scheme's group size; or one for each matrix: one scale per row, halved down to that"
    )
    alpha: float = Field(
        0.9, gt=0, le=1, description="adaptive: groups are halved while the ratio of new range to old is below this"
    )
    rule: Literal["mean", "some", "paper"] = Field(
        "mean", description="adaptive: mean or smallest (some) ratio of the groups below alpha; paper: any ratio above alpha"
    )
    share: Literal["readers", "none"] = Field(
        "readers",
        description="adaptive: matrices that readers fuse (q, k, v; gate, up; experts) take the finest group, or none",
    )

    @model_validator(mode="after")
    def _adaptive(self) -> Self:
        if self.granularity == "fixed":
            fields = type(self).model_fields
            if given := [name for name in ("alpha", "rule", "share") if getattr(self, name) != fields[name].default]:
                raise ValueError(f"{', '.join(given)}: only with granularity=adaptive")
        elif self.scheme.group is None or self.scheme.scales != "row" or self.scheme.fixed:
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
    """Chooses the group size of each matrix by the ranges of its groups."""

    gradients: ClassVar[bool] = False

    def __init__(self, pass_: AdaptiveGroupPass) -> None:
        self.pass_ = pass_
        assert pass_.scheme.group is not None
        self.least = pass_.scheme.group
        """Columns of the smallest group."""

    def offers(self, weight: Weight, state: State) -> tuple[State, ...]:
        """One scale per row, its halvings, and last the scheme's group, which matrices of other widths can share."""
        from compress.numerics.granularity import widths

        whole = replace(self.pass_.scheme, group=None)
        state = self.pass_.coded(weight, state, whole)
        finer = widths(weight.columns, self.least)[1:]
        if weight.columns % self.least == 0 and self.least < weight.columns and self.least not in finer:
            finer.append(self.least)
        return state, *(replace(state, scheme=replace(whole, group=group)) for group in finer)

    def costs(self, offer: Offer, value: torch.Tensor, gradient: torch.Tensor | None) -> tuple[float, ...]:
        """The rule's number for each halving: the mean, smallest or largest ratio of new ranges to old ones."""
        from compress.numerics.granularity import halvings, widths
        from compress.numerics.outliers import split

        if (outliers := offer.states[0].outliers) is not None:
            value = split(value, outliers)[0]
        scheme = self.pass_.scheme
        found = halvings(value, widths(offer.weight.columns, self.least), scheme.symmetric, scheme.minimum)
        return tuple({"mean": step.mean, "some": step.least, "paper": step.most}[self.pass_.rule] for step in found)

    def decide(self, offers: Sequence[Offer], rest: Rest) -> dict[str, State]:
        found = {offer.weight.name: offer.states[self._halvings(offer)] for offer in offers}
        fused: dict[str, list[Offer]] = defaultdict(list)
        for offer in offers if self.pass_.share == "readers" else ():
            fused["experts" if offer.weight.kind == "expert" else together(offer.weight.name)].append(offer)
        for members in fused.values():
            by_group = [{_group(state): state for state in offer.states[1:]} for offer in members]
            finest = min((group for offer in members if (group := _group(found[offer.weight.name]))), default=0)
            common = [group for group in by_group[0] if group <= finest and all(group in own for own in by_group)]
            for offer, own in zip(members, by_group, strict=True) if common else ():
                found[offer.weight.name] = own[max(common)]
        return found

    def _halvings(self, offer: Offer) -> int:
        """How many times the groups of a matrix are halved."""
        alpha = self.pass_.alpha
        for number, ratio in enumerate(offer.costs):
            if (ratio <= alpha) if self.pass_.rule == "paper" else (ratio >= alpha):
                return number
        return len(offer.costs)


def _group(state: State) -> int:
    """Columns that share a scale; 0 for one scale per row."""
    assert state.scheme is not None
    return state.scheme.group or 0
