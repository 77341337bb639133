"""Slicing options: which sizes a smaller model is asked to have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from pydantic import Field, field_validator

from compress.contract.slicing_pass import SlicingPass, Structure
from compress.errors import Refusal, UsageError
from compress.spec.byte_size import parse_size
from compress.spec.kept import Sizes

_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?)", re.ASCII)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_STEPS = 400
_EVEN = 16
"""Hidden channels that follow from a target are a multiple of this, or of `multiple` where it has a smaller one in common."""


class WidthOptions(SlicingPass):
    """The widths of a smaller model; those that are not given stay."""

    hidden: int | None = Field(None, ge=1, description="channels of the residual stream")
    heads: int | None = Field(None, ge=1, description="query heads of a layer; as many are kept of every key-value head")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads of a layer, each with its query heads")
    ffn: int | None = Field(None, ge=1, description="neurons of a dense feed-forward")
    expert_ffn: int | None = Field(None, ge=1, description="neurons of each routed expert")
    shared_ffn: int | None = Field(None, ge=1, description="neurons of the expert that every token is sent to")

    def widths(self, before: Sizes) -> Sizes:
        """The sizes that were asked for. Raises Refusal."""
        groups = self.kv_heads or before.groups
        queries = self.heads or groups * before.share
        wanted = {"units": self.ffn, "expert_units": self.expert_ffn, "shared_units": self.shared_ffn}
        words = {"units": "ffn", "expert_units": "expert_ffn", "shared_units": "shared_ffn"}
        for name, size in wanted.items():
            if size and not getattr(before, name):
                raise Refusal(f"{words[name]}={size}, and the model has no such part: {before}", f"leave {words[name]} out")
        found = {name: size or getattr(before, name) for name, size in wanted.items()}
        return replace(before, hidden=self.hidden or before.hidden, groups=groups, queries=queries, **found)

    def asked(self) -> bool:
        """Whether any width is given."""
        return any((self.hidden, self.heads, self.kv_heads, self.ffn, self.expert_ffn, self.shared_ffn))


class TargetOptions(SlicingPass):
    """A target in parameters or bytes instead of sizes."""

    parameters: str = Field("", description="instead of sizes: at most so many parameters, e.g. 100M; tied ones count once")
    size: str = Field("", description="instead of sizes: at most so many bytes of tensors, e.g. 200MB")
    multiple: int = Field(64, ge=1, description="sizes that follow from parameters or size are multiples of it")

    @field_validator("parameters")
    @classmethod
    def _counted(cls, value: str) -> str:
        if value and _COUNT.fullmatch(value.upper()) is None:
            raise ValueError(f"a number such as 100M or 1.3B, not '{value}'")
        return value

    @field_validator("size")
    @classmethod
    def _sized(cls, value: str) -> str:
        if value:
            try:
                parse_size(value)
            except UsageError as error:
                raise ValueError(error.problems[0].got) from None
        return value

    def target(self, structure: Structure) -> tuple[int, Callable[[Sizes], int]]:
        """(the most, what it counts of a model of some sizes)."""
        if self.parameters:
            match = _COUNT.fullmatch(self.parameters.upper())
            assert match is not None
            return int(float(match[1]) * _UNITS[match[2]]), structure.parameters
        return parse_size(self.size), structure.nbytes

    def fitting(self, structure: Structure, exponents: Mapping[str, float]) -> Sizes:
        """The largest sizes within the target.

        A part shrinks by the common factor to the power of its exponent; then neurons fill what is left.
        Raises Refusal if nothing fits, or the model is as small already.
        """
        most, count = self.target(structure)
        before = structure.sizes
        if count(before) <= most:
            raise Refusal(f"a target of {most:,}, and the model has {count(before):,}", "choose a smaller target")

        def at(factor: float) -> Sizes:
            def part(name: str, unit: int = 1) -> int:
                size: int = getattr(before, name)
                wanted = round(size * factor ** exponents[name] / unit) * unit
                return min(size, max(min(unit, size), wanted)) if size else 0

            sizes = {name: part(name, self.multiple if name.endswith("units") else 1) for name in exponents if name != "hidden"}
            made = replace(before, **sizes)
            made = replace(made, queries=made.groups * before.share)
            # Many configs refuse a width that is no multiple of the number of heads.
            unit = math.lcm(made.queries, math.gcd(self.multiple, _EVEN))
            return replace(made, hidden=part("hidden", unit)) if "hidden" in exponents else made

        factors = (1 - step / _STEPS for step in range(1, _STEPS))
        found = next((sizes for factor in factors if count(sizes := at(factor)) <= most), None)
        if found is None:
            raise Refusal(f"a target of {most:,}, and the smallest model has {count(at(1 / _STEPS)):,}", "choose a larger target")
        name = "units" if before.units else "expert_units"
        while (more := getattr(found, name) + self.multiple) <= getattr(before, name):
            wider = replace(found, **{name: more})
            if count(wider) > most:
                break
            found = wider
        return found
