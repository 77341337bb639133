"""Anomalies: finds suspicious values in a weight that a pass has made.

    large error    |W - W'| is more than half of |W|
    zero rows      an output whose every weight has become zero, and was not
    clamped        groups whose scale is the smallest or the largest number that its dtype has

Numbers that are not finite are an error: all weights that share their scale are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compress.errors import InputError
from compress.numerics.qtensor import QTensor, along_inputs
from compress.spec.weight_state import Weight

LARGE = 0.5
WORDS = ("large error", "zero rows", "clamped")


def watch(
    weight: Weight, value: Any, error: float | None, before: Callable[[], Any], do: str = "skip it, or choose other options"
) -> list[tuple[str, str]]:
    """(what, reason) for each anomaly in `value`, codes or a tensor [experts?, rows, columns].

    `error` is the relative error; `before` returns the weight before the pass, in either form. Raises InputError for NaN and Inf.
    """
    coded = isinstance(value, QTensor)
    factors = [value.lowrank.left, value.lowrank.right] if coded and value.lowrank is not None else []
    numbers = [part for part in (value.steps(), value.lows()) if part is not None] if coded else [value]
    if not all(bool(part.float().isfinite().all()) for part in (*numbers, *factors)):
        got = "NaN or Inf" + (" among its scales" if coded else "")
        raise InputError(f"'{weight.name}'", "finite numbers in what the pass has made", got, do)
    found = []
    if error is not None and error > LARGE:
        found.append(("large error", f"the pass has cost more than {LARGE:.0%} of the weight's norm"))
    zero = ~_filled(weight, value)
    if bool(zero.any()) and bool((zero & _filled(weight, before())).any()):
        found.append(("zero rows", "an output whose every weight has become zero"))
    if coded and value.scheme.scales == "row":
        limits, size = torch.finfo(value.scale.dtype), value.scale.abs()
        # A group of zeros has the scale 0 where no code means zero.
        least = (size <= limits.tiny) & ~((size == 0) & value.scheme.zeroless)
        if bool((least | (size >= limits.max)).any()):
            found.append(("clamped", f"a scale at the limit of {str(value.scale.dtype).removeprefix('torch.')}"))
    return found


def _filled(weight: Weight, value: Any) -> torch.Tensor:
    """Which outputs have a non-zero weight, bool [experts?, outputs]."""
    zero = 0
    if isinstance(value, QTensor):
        if not value.scheme.whole or not value.scheme.symmetric or value.outliers is not None or value.lowrank is not None:
            return along_inputs(weight, value.nonzero()).any(-1)
        value, zero = value.codes, value.scheme.middle
    # By its extremes, which take no booleans for every entry.
    matrix = along_inputs(weight, value)
    return (matrix.amax(-1) != zero) | (matrix.amin(-1) != zero)
