"""Leaves out routed experts, those that add least to the hidden states.

    reap        mean over an expert's tokens of gate times norm of its output (REAP, Lasby et al., 2510.13999)
    frequency   how many tokens are sent to it

The router loses the rows of these experts, and a token goes to the best of those that are left. As many are kept in every layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from compress.contract.slicing_pass import Fact, Observed, SlicingPass, Structure
from compress.errors import Refusal
from compress.spec.kept import Kept, Sizes


class Experts(SlicingPass):
    """Leaves out the routed experts that matter least."""

    example: ClassVar[str] = "calibrate | prune.experts(experts=2)"
    example_family: ClassVar[str] = "mixtral"

    experts: int = Field(ge=1, description="how many routed experts are kept in each layer")
    by: Literal["reap", "frequency"] = Field("reap", description="what an expert's score is: see above")

    def resized(self, structure: Structure) -> Sizes:
        there = structure.sizes.experts
        if not there:
            raise Refusal("the model has no routed experts", "use prune.width or prune.depth")
        if self.experts >= there:
            raise Refusal(f"experts={self.experts}, and the model has {there}", "keep fewer")
        return replace(structure.sizes, experts=self.experts)

    def facts(self) -> tuple[Fact, ...]:
        return ("experts",)

    def keep(self, observed: Observed, before: Sizes, after: Sizes) -> Kept:
        from compress.numerics.importance import best

        kept = Kept.first(before, before)
        blocks = []
        for block, saliency, tokens in zip(kept.blocks, observed.experts, observed.routed, strict=True):
            experts = best(saliency if self.by == "reap" else tokens, after.experts)
            blocks.append(
                replace(
                    block, experts=experts, units={n: u for n, u in block.units.items() if not n.isdigit() or int(n) in experts}
                )
            )
        return replace(kept, blocks=tuple(blocks))
