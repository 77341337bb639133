"""Every kind of weight that kernels are compiled for, and few of them that show what any two properties do together."""

from __future__ import annotations

from dataclasses import replace

from compress.kernels.native import tiles
from compress.kernels.native.kind import HALVES, Kind

Case = tuple[Kind, int]
"""A kind, and how many eights of tokens a block multiplies."""


def kinds() -> list[Kind]:
    """All that there are."""
    wide = [("int", bits, zero) for bits in (2, 3, 4, 8) for zero in (False, True)] + [("e2m1", 4, False), ("table", 4, False)]
    found = [Kind(*grid, planes, scale, "f16") for grid in wide for planes in folds(grid[1]) for scale in ("f16", "bf16", "f32")]
    found += [Kind("e2m1", 4, False, 1, "e8m0", "f16"), Kind("e2m1", 4, False, 0, "e4m3", "f16")]
    found += [Kind(grid, 8, False, 2, "f32", "f16") for grid in ("e4m3", "e5m2")]
    return [replace(kind, x=x) for kind in found for x in HALVES.values()]


def folds(bits: int) -> list[int]:
    """How many planes may have the same scale."""
    return [planes for planes in (0, 1, 2, 4, 8) if planes <= tiles.chunk(bits) // tiles.WORDS]


def every() -> list[Case]:
    return [(kind, tokens) for kind in kinds() for tokens in (1, 2, 4)]


def covering() -> list[Case]:
    """Few of them, in which every property occurs, and with every grid every dtype of activations."""

    def properties(case: Case) -> set[tuple[object, ...]]:
        kind, tokens = case
        grid = (kind.grid, kind.bits, kind.zero)
        return {*enumerate((grid, kind.planes, kind.scale, tokens)), (grid, kind.x)}

    cases, chosen = every(), []
    left = set().union(*map(properties, cases))
    while left:
        chosen.append(max(cases, key=lambda case: len(properties(case) & left)))
        left -= properties(chosen[-1])
    return chosen
