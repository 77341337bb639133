"""Joins key-value heads: each new one is the mean of several.

It is read by all of their query heads. Grouped-query attention from multi-head attention (Ainslie et al., 2305.13245), whose
cache is smaller. Without training it costs much quality: heads that are equal are joined without loss, others are not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.contract.slicing_pass import Observed, SlicingPass, Structure
from compress.errors import Refusal
from compress.spec.kept import Kept, Sizes

if TYPE_CHECKING:
    import torch

    from compress.architecture.axes import Slice


class Gqa(SlicingPass):
    """Joins key-value heads by their mean."""

    example: ClassVar[str] = "prune.gqa(kv_heads=1)"

    kv_heads: int = Field(ge=1, description="how many key-value heads are left in each layer")

    def resized(self, structure: Structure) -> Sizes:
        there = structure.sizes.groups
        if self.kv_heads >= there or there % self.kv_heads:
            raise Refusal(f"kv_heads={self.kv_heads}, and the model has {there}", "choose a number that divides it, below it")
        return replace(structure.sizes, groups=self.kv_heads)

    def keep(self, observed: Observed, before: Sizes, after: Sizes) -> Kept:
        return Kept.first(after, before)

    def value(self, one: Slice, value: torch.Tensor, kept: Kept, before: Sizes) -> torch.Tensor:
        import torch

        joined = len(kept.blocks[0].groups)

        def mean(heads: torch.Tensor, axis: int) -> torch.Tensor:
            # In fp32, over heads that follow each other.
            apart: torch.Tensor = heads.float().unflatten(axis, (joined, before.groups // joined, before.head))
            return apart.mean(axis + 1).flatten(axis, axis + 1).to(heads.dtype)

        for axis, dim in enumerate(one.dims):
            if "groups" not in dim:
                continue
            parts = dim.split("+")
            widths = [(before.queries if part == "queries" else before.groups) * before.head for part in parts]
            pieces = zip(parts, value.split(widths, axis), strict=True)
            value = torch.cat([piece if part == "queries" else mean(piece, axis) for part, piece in pieces], axis)
        return value.contiguous()
