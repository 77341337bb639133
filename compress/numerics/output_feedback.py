"""Output feedback: rows rounded a few at a time, each making up for those before.

YAQA (Tseng et al., 2505.22988). Legend as in gptq.py: W [rows, n], D = W - Q, H [n, n] of the inputs; G [rows, rows] the mean of
g g^T over tokens, g the gradient of the loss by a weight's outputs, lambda its damping; F the feedback of G + lambda I.
Loss: trace(G D H D^T), what the KL to the unchanged model grows by, to second order, where g and x do not depend on each other.

For given errors D_a of the rows before, it is least over all others for D_r = -G_rr^-1 G_ra D_a, whatever H is. So these aim at
W_r + G_rr^-1 G_ra D_a, and GPTQ rounds towards that as it would towards W_r: both kinds of feedback add up to YAQA's. The rows of
a block do not make up for each other. Rows of large matrices do so within segments, which bounds G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from compress.numerics.hessian import Hessian, factor

SEGMENT = 4096
"""The most rows that make up for each other."""
BLOCK = 32
"""The least rows that are rounded together; more where that would be more than PARTS blocks."""
PARTS = 32


def segments(rows: int) -> list[slice]:
    """Rows that have a Gram matrix of their own."""
    return [slice(start, min(rows, start + SEGMENT)) for start in range(0, rows, SEGMENT)]


def gram_numbers(rows: int) -> int:
    """Numbers of the Gram matrices of a weight."""
    return sum((part.stop - part.start) ** 2 for part in segments(rows))


class OutputGrams:
    """Sums of g g^T of the segments of a weight's rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sums = [Hessian(part.stop - part.start) for part in segments(rows)]

    def add(self, gradients: torch.Tensor) -> None:
        """Adds gradients [tokens, rows]."""
        for part, held in zip(segments(self.rows), self.sums, strict=True):
            held.add(gradients[:, part])

    def means(self) -> list[torch.Tensor]:
        """G of each segment; only once."""
        return [held.mean() for held in self.sums]


def round_in_turn(
    w: torch.Tensor, grams: Sequence[torch.Tensor], damping: float, rounded: Callable[[torch.Tensor, slice], torch.Tensor]
) -> None:
    """Calls `rounded` with what each block of rows aims at, [some, n], and which rows they are; it returns their values Q."""
    for segment, gram in zip(segments(len(w)), grams, strict=True):
        own = w[segment].float()
        f, d = factor(gram, damping).feedback, torch.empty_like(own)
        for rows in blocks(len(own)):
            moved = f[: rows.start, rows].T @ d[: rows.start]
            # As for columns: if every row of the block met its aim, w - aim would add to the next.
            aim = own[rows] + torch.linalg.solve_triangular(f[rows, rows].T, moved, upper=False, unitriangular=True)
            found = rounded(aim, slice(segment.start + rows.start, segment.start + rows.stop))
            d[rows] = own[rows] - found


def blocks(rows: int) -> Iterator[slice]:
    """Rows of a segment that are rounded together."""
    size = max(BLOCK, -(-rows // PARTS))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))
