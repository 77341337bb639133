"""Takes the first layers, channels, heads and neurons of a model.

For a model whose parts are sorted by importance, as `prune.nested` does or a nested training did (MatFormer, Devvrit et al.,
2310.07707): any prefix of it is a smaller model. A prefix of a prefix is the same as the smaller prefix. Data-free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

from pydantic import Field, model_validator

from compress.contract.slicing_options import WidthOptions
from compress.contract.slicing_pass import Observed, Structure
from compress.spec.kept import Kept, Sizes


class Prefix(WidthOptions):
    """Takes the first layers, channels, heads and neurons."""

    example: ClassVar[str] = "prune.slice(ffn=32)"

    layers: int | None = Field(None, ge=1, description="layers")
    experts: int | None = Field(None, ge=1, description="routed experts of a layer")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.asked() or self.layers or self.experts):
            raise ValueError("give the sizes of the smaller model, such as ffn or layers")
        return self

    def resized(self, structure: Structure) -> Sizes:
        sizes = self.widths(structure.sizes)
        return replace(sizes, layers=self.layers or sizes.layers, experts=self.experts or sizes.experts)

    def keep(self, observed: Observed, before: Sizes, after: Sizes) -> Kept:
        return Kept.first(after, before)
