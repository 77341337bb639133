"""MoQE: quantizes routed experts only; all other weights stay dense.

Kim et al., 2310.02410: experts hold most of a mixture's weights and tolerate rounding best, down to 2 bits without data (the
paper then trains the model; `distill.logits` does that here). One scale per output channel, 2 max|w| / (2^b - 1), and no
zero point. The paper's `int()` leaves the rounding open: truncation would give 3 levels for 2 bits, rounding to nearest 5,
which 2 bits cannot store. Here codes are rounded to nearest and clamped to +-(2^(b-1) - 1): the error is at most half a step,
as the largest weight lies half a step beyond, Q(-w) is -Q(w), and one code is unused (2 bits are ternary). With
`grid=full` all codes are used, exactly as by quantize.rtn with targets=[experts].

Groups, searched ranges and groups by matrix are options; so is GPTQ, with each expert's own calibration tokens: experts that
few tokens reach are rounded to nearest, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.adaptive_group_pass import AdaptiveGroupPass
from compress.contract.discover import load_pass
from compress.contract.pass_base import Pass
from compress.contract.shapes import DelegatingPass, Route
from compress.errors import InputError, UsageError
from compress.spec.scheme import Scheme
from compress.spec.weight_state import Note, State, Weight, counted


class Moqe(AdaptiveGroupPass, DelegatingPass):
    """Rounds the weights of routed experts to few bits."""

    example: ClassVar[str] = "quantize.moqe(scheme=w3a16g32, granularity=adaptive, share=none, alpha=0.95)"
    example_family: ClassVar[str] = "mixtral"

    scheme: Scheme = Field(
        Scheme(4), description="symmetric integers: w2a16, w3a16, w4a16 or w8a16 per output channel, or in groups, e.g. w4a16g64"
    )
    targets: tuple[str, ...] = Field(("experts",), description="which weights of routed experts: all, or by re:REGEX or name")
    method: Literal["rtn", "gptq"] = Field("rtn", description="round to nearest without data, or GPTQ on calibration tokens")
    grid: Literal["paper", "full"] | None = Field(
        None, description="as many codes below zero as above (paper), the default of rtn; or all codes (full), that of gptq"
    )
    clip: Literal["none", "mse"] | None = Field(
        None,
        description="range of a group: its largest magnitude (none), the default of rtn; or the best one (mse), that of gptq",
    )
    min_tokens: int | None = Field(
        None, ge=0, description="gptq: experts that see fewer calibration tokens are rounded to nearest; by default 32"
    )

    route: Route = "router"

    @model_validator(mode="after")
    def _as_the_paper(self) -> Self:
        if not self.scheme.integer or not self.scheme.symmetric or self.scheme.inputs:
            raise ValueError(f"scheme: symmetric integers and a16, not {self.scheme}; quantize.rtn takes others for experts")
        if self.least_zero:
            raise ValueError("least_zero: leave it out, for symmetric codes have no zero point")
        if self.method == "gptq" and self.grid == "paper":
            raise ValueError("grid: full with method=gptq")
        if self.method == "rtn" and self.min_tokens is not None:
            raise ValueError("min_tokens: only with method=gptq")
        if self.method == "rtn" and self.route == "all":
            raise ValueError("route=all: only with method=gptq")
        return self

    def worker(self) -> Pass:
        own = {"grid": self.grid or "paper"} if self.method == "rtn" else {"route": self.route}
        given = {"clip": self.clip, "min_tokens": self.min_tokens, **own}
        options = {name: value for name, value in given.items() if value is not None}
        return load_pass(f"quantize.{self.method}").model_validate({"scheme": self.scheme, **options})

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        if not any(weight.kind == "expert" for weight in weights):
            do = "use quantize.rtn or quantize.gptq, which take every linear"
            raise InputError(self.pass_name(), "a model with routed experts", "a dense one", do)
        found = super().chosen(weights)
        if other := next((weight for weight in found if weight.kind != "expert"), None):
            do = "use quantize.rtn or quantize.gptq for it"
            raise UsageError(f"{self.pass_name()}.targets", "weights of routed experts", f"'{other.name}', a {other.kind}", do)
        return found

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        return [*super().notes(weights, states), *counted("experts", {weight.name: _layout(weight) for weight in weights})]


def _layout(weight: Weight) -> str:
    """A text on how the experts of a weight are stored."""
    if weight.experts is None:
        return "a tensor for each expert"
    return f"{weight.experts} experts in one tensor, each stored [{'in, out' if weight.transposed else 'out, in'}]"
