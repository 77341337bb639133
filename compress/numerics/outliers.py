"""Outliers: the largest entries of a matrix, kept unrounded next to its codes.

LLM-MQ (Li et al., ENLSP 2023) after SqueezeLLM (2306.07629): a small share of the weights, the largest in magnitude, is
removed before scales are chosen, and stored unrounded. The rest of the matrix has zeros in their places; every grid has
a code for zero, so fitting and rounding need not know of outliers. Of equal magnitudes the first is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from compress.numerics.masks import keep_above
from compress.spec.corrections import SHORT, Outliers


@dataclass(frozen=True)
class Sparse:
    """Entries by rows: values [experts?, n] in the weight's dtype, columns [experts?, n], offsets int32 [experts?, rows + 1].

    `columns` is uint16, or int32 where a row is longer; entries of row i are at offsets[i] up to offsets[i + 1].
    """

    values: torch.Tensor
    columns: torch.Tensor
    offsets: torch.Tensor

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row (numbered through all experts) and column of each entry: int64 [entries] each."""
        counts = self.offsets.diff(dim=-1).flatten()
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        return rows, self.columns.flatten().long()

    def put(self, dense: torch.Tensor) -> torch.Tensor:
        """Writes the entries into `dense` [experts?, rows, columns], contiguous, and returns it."""
        dense.view(-1, dense.shape[-1])[self.places()] = self.values.flatten().to(dense.dtype)
        return dense

    def clear(self, dense: torch.Tensor) -> torch.Tensor:
        """Writes zeros into the entries' places in `dense`, and returns it."""
        dense.view(-1, dense.shape[-1])[self.places()] = 0
        return dense

    def take(self, rows: torch.Tensor) -> Sparse:
        """The entries of some rows of a matrix, int64 [n], in their order."""
        counts = self.offsets.diff()[rows].long()
        ends = counts.cumsum(0)
        at = (self.offsets[rows] - ends + counts).repeat_interleave(counts) + torch.arange(int(counts.sum()), device=rows.device)
        # As int32, because torch cannot index uint16.
        return Sparse(self.values[at], self.columns.int()[at], torch.cat([ends.new_zeros(1), ends]))


class Split(NamedTuple):
    """A matrix without its outliers, in its own dtype; their mask, bool; and the outliers."""

    rest: torch.Tensor
    mask: torch.Tensor
    sparse: Sparse


def split(w: torch.Tensor, outliers: Outliers) -> Split:
    """Splits the largest entries of each matrix off `w` [experts?, rows, columns]."""
    rows, columns = w.shape[-2:]
    kept = outliers.count(rows, columns)
    mask = torch.stack([keep_above(m.flatten().float().abs(), m.numel() - kept) for m in w.reshape(-1, rows, columns)])
    mask = mask.view(w.shape)
    return Split(w.masked_fill(mask, 0), mask, gather(w, mask))


def gather(w: torch.Tensor, mask: torch.Tensor) -> Sparse:
    """The entries of `w` [experts?, rows, columns] where `mask` is set, as many in each matrix."""
    lead = w.shape[:-2]
    counts = mask.sum(-1, dtype=torch.int32)
    offsets = torch.cat([counts.new_zeros(*lead, 1), counts.cumsum(-1, dtype=torch.int32)], -1)
    index = torch.uint16 if w.shape[-1] <= SHORT else torch.int32
    return Sparse(w[mask].view(*lead, -1), mask.nonzero()[:, -1].to(index).view(*lead, -1), offsets)
