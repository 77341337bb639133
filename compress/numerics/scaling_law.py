"""Scaling law: the loss that a family of models would have at another size.

L(N) = a N^-b + c, with N parameters, goes exactly through three sizes of a family (Sheared LLaMA, 2310.06694, takes 7B, 13B and
70B). The ratio of the two falls of the loss depends on b alone, and grows with it, so b is found by bisection; a and c follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_STEEPEST = 64.0
"""Largest b that is looked for: real families have less than 1."""


@dataclass(frozen=True)
class ScalingLaw:
    """A loss by size; `middle` is the size that N is counted in, so that powers stay near 1."""

    a: float
    b: float
    c: float
    middle: float

    def loss(self, parameters: float) -> float:
        """The loss of a model with that many parameters."""
        return self.a * math.pow(parameters / self.middle, -self.b) + self.c


def through(sizes: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The law through three (size, loss). Raises ValueError where there is none with a and b above 0."""
    if len(sizes) != 3 or len(losses) != 3:
        raise ValueError(f"three sizes with a loss each, not {len(sizes)} with {len(losses)}")
    points = sorted(zip(sizes, losses, strict=True))
    small, middle, large = (size for size, _ in points)
    if not (0 < small < middle < large < math.inf):
        raise ValueError(f"three different sizes above 0, not {', '.join(f'{size:g}' for size in sizes)}")
    first, second = points[0][1] - points[1][1], points[1][1] - points[2][1]
    if not (first > 0 and second > 0):
        raise ValueError(f"losses that fall as models grow, not {', '.join(f'{loss:g}' for _, loss in points)}")
    # How often the loss falls by e on the way, in units of b.
    before, after = math.log(middle / small), math.log(large / middle)

    def ratio(b: float) -> float:
        # Of falls (1 - e^x) of a power between two sizes, with the middle one as 1.
        return math.expm1(b * before) / -math.expm1(-b * after)

    wanted, low, high = first / second, 0.0, _STEEPEST / max(before, after)
    if not before / after < wanted < ratio(high):
        got = "flattens too fast" if wanted >= ratio(high) else "does not flatten"
        raise ValueError(f"losses on a curve a N^-b + c with b above 0; this one {got}")
    for _ in range(200):
        b = (low + high) / 2
        low, high = (b, high) if ratio(b) < wanted else (low, b)
    a = second / -math.expm1(-b * after)
    return ScalingLaw(a, b, points[1][1] - a, middle)
