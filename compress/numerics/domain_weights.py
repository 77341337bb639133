"""Domain weights: the shares of domains in training follow their losses.

Dynamic batch loading (Xia et al., Sheared LLaMA, 2310.06694, algorithm 1): a domain whose loss is above its reference gets more
of the next samples. Two forms are in use. Legend: w weights, k domains, l losses, r references, c smoothing.

    paper   w' = w exp(max(l - r, 0)), divided by its sum
    code    w' = w exp(eta (l - r)), divided by its sum, and then (1 - c) w' + c / k; c = 1e-4, eta = 1

Without the maximum a domain that is already below its reference loses share, and the smoothing keeps each share at c / k at
least, so that no domain is lost for good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Rule = Literal["paper", "code"]


def updated(
    weights: Sequence[float], losses: Sequence[float], references: Sequence[float], rule: Rule, eta: float = 1.0,
    smoothing: float = 0.0,
) -> list[float]:  # fmt: skip
    """The weights after one update; they sum to 1.

    A domain whose loss is not a finite number keeps its share, and the others divide theirs among themselves.
    """
    measured = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    whole = sum(weights)
    found = [weight / whole for weight in weights]
    share = sum(found[i] for i in measured)
    if share > 0:
        exponents = {i: _log(found[i]) + _gain(losses[i] - references[i], rule, eta) for i in measured}
        most = max(exponents.values())
        powers = {i: math.exp(exponent - most) for i, exponent in exponents.items()}
        total = sum(powers.values())
        for i, power in powers.items():
            found[i] = share * power / total
    found = [(1 - smoothing) * weight + smoothing / len(found) for weight in found]
    whole = sum(found)
    return [weight / whole for weight in found]


def _gain(excess: float, rule: Rule, eta: float) -> float:
    """What an excess loss adds to the logarithm of a weight."""
    return max(excess, 0.0) if rule == "paper" else eta * excess


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf
