"""LoftQ: codes and low-rank factors of a matrix, optimised in turn.

Legend: W [rows, columns]; Q the dequantized codes; A B the factors' product, as stored; T rounds.

    Q_t = q(W - A_(t-1) B_(t-1)),    A_t B_t = the best of rank r for W - Q_t

(Li et al., 2310.08659). The second step never increases |W - Q - A B|. The first does not either if q is a projection onto a
fixed set, the grid that the first round has fitted (`frozen`). If scales are fitted anew q is no such projection, because the
grid changes, and at two bits the residual increases in most rounds. So the best round is kept, which is never worse than
the first: the codes of W with the factors of their error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from compress.numerics.lowrank import best, stored
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import on_grid
from compress.spec.corrections import Lowrank


class Alternated(NamedTuple):
    """Codes with their factors, and |W - Q - A B|^2 after each round."""

    q: QTensor
    residuals: list[float]


def alternate(
    w: torch.Tensor, rounded: Callable[[torch.Tensor], QTensor], lowrank: Lowrank, rounds: int, frozen: bool = False,
    keep_best: bool = True,
) -> Alternated:  # fmt: skip
    """`rounds` rounds on `w` [rows, columns]; `rounded` is q."""
    w = w.float()
    q = kept = rounded(w)
    residuals: list[float] = []
    for number in range(rounds):
        if number:
            assert q.lowrank is not None
            rest = w - q.lowrank.product()
            q = on_grid(rest, q) if frozen else rounded(rest)
        lost = w - q.base()
        q = replace(q, lowrank=stored(*best(lost, lowrank.rank), lowrank))
        assert q.lowrank is not None
        residuals.append(float((lost - q.lowrank.product()).double().square().sum()))
        if not keep_best or residuals[-1] == min(residuals):
            kept = q
    return Alternated(kept, residuals)
