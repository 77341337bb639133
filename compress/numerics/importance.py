"""Importance: scores of channels, heads and neurons from their activations.

Minitron (Muralidharan et al., 2407.14679): an activation's magnitude is averaged over the tokens of a sample, and samples are
combined by their root of summed squares, A_i = sqrt(sum_s (mean_t |a_sti|)^2).
"""

from __future__ import annotations

import torch


class Importance:
    """Accumulates (mean |a|)^2 over samples; additive over processes."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, sample: torch.Tensor, samples: int) -> None:
        """Adds activations [rows, width]; `sample` [rows] says which of the batch's `samples` each belongs to."""
        sums = torch.zeros(samples, x.shape[1], dtype=torch.float64, device=x.device)
        sums.index_add_(0, sample, x.abs().double())
        counts = torch.bincount(sample, minlength=samples).clamp(min=1)
        self.squares += (sums / counts[:, None]).square().sum(0)

    def scores(self) -> torch.Tensor:
        """A [width], fp64. Raises ValueError if an activation was not finite."""
        found = self.squares.sqrt().cpu()
        if not bool(torch.isfinite(found).all()):
            raise ValueError("an activation was not finite")
        return found


def by_head(scores: torch.Tensor, heads: int) -> torch.Tensor:
    """Scores of heads, from those of their channels [heads * channels]: the norm of each."""
    return scores.view(heads, -1).square().sum(1).sqrt()


def best(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """The `count` places with the largest scores, in ascending order; of equal ones the first."""
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def best_queries(scores: torch.Tensor, groups: tuple[int, ...], share: int, count: int) -> tuple[int, ...]:
    """The `count` best query heads of each key-value head in `groups`, whose `share` query heads follow each other."""
    found: list[int] = []
    for group in groups:
        found += [group * share + n for n in best(scores[group * share : (group + 1) * share], count)]
    return tuple(found)
