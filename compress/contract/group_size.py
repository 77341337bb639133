"""Group size: the group that divides a weight's columns, or its refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from compress.errors import Refusal
from compress.spec.scheme import SUPER, Scheme
from compress.spec.weight_state import Weight

Ragged = Annotated[
    Literal["refuse", "divide", "channel"],
    Field(description="if the group does not divide the columns: refuse, use the largest one that does, or one scale per row"),
]
_SMALLEST_GROUP = 16
_NARROWER = {2: "iq4_nl", 3: "iq4_nl", 4: "w5a16g32", 5: "w5a16g32-min", 6: "w8a16g32"}
"""Bits of a K-quant -> the scheme of the type that llama.cpp takes in its place where 256 does not divide the columns."""


def fitting(scheme: Scheme, weight: Weight, ragged: str) -> Scheme:
    """The scheme, with another group if its own does not divide a weight's columns. Raises Refusal."""
    group, columns = scheme.group, weight.columns
    if scheme.scales == "k" and columns % SUPER:
        return fitting(Scheme.parse(_NARROWER[scheme.bits]), weight, ragged)
    if group is None or columns % group == 0 or scheme.scales == "block":
        return scheme
    if scheme.scales != "row" or scheme.fixed:
        raise Refusal(f"the groups of {group} that {scheme} has do not divide {columns} columns", "skip it, or use fp4g")
    if ragged == "channel":
        return replace(scheme, group=None)
    divisors = [g for g in range(_SMALLEST_GROUP, min(group, columns + 1)) if columns % g == 0]
    if ragged == "divide" and divisors:
        return replace(scheme, group=divisors[-1])
    near = f"ragged=divide (groups of {divisors[-1]}), " if divisors else ""
    raise Refusal(f"groups of {group} do not divide {columns} columns", f"{near}ragged=channel, or another group")
