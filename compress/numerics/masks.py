"""Masks: which entries of a matrix to keep, by their scores; checks of patterns.

Legend: scores fp32 >= 0 [experts?, out, in], larger is more worth keeping; the inputs are the last dimension. Ties
are broken by position, the earlier entry kept, so that a mask is the same wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compress.spec.sparsity import Sparsity

_CHUNK = 1 << 20
"""Entries sorted at a time: a sort needs four times the memory of what it sorts."""


def keep_best(scores: torch.Tensor, sparsity: Sparsity, per_row: bool = False) -> torch.Tensor:
    """bool mask of `scores`' shape. A fraction p drops exactly int(n * p) of a matrix's (or a row's) n entries.

    Raises ValueError where n:m does not divide the inputs.
    """
    columns = scores.shape[-1]
    if sparsity.of is not None:
        if columns % sparsity.of:
            raise ValueError(f"{sparsity.of} does not divide {columns} inputs")
        return keep_in_rows(scores.reshape(-1, sparsity.of), sparsity.kept or 0).reshape(scores.shape)
    assert sparsity.fraction is not None
    if per_row:
        keep = columns - int(columns * sparsity.fraction)
        return keep_in_rows(scores.reshape(-1, columns), keep).reshape(scores.shape)
    matrices = scores.reshape(-1, scores.shape[-2] * columns)
    drop = int(matrices.shape[-1] * sparsity.fraction)
    return torch.stack([keep_above(matrix, drop) for matrix in matrices]).reshape(scores.shape)


def keep_in_rows(rows: torch.Tensor, keep: int) -> torch.Tensor:
    """bool mask of the `keep` largest of every row [rows, columns]."""
    mask = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    step = max(1, _CHUNK // rows.shape[-1])
    for start in range(0, len(rows), step):
        order = rows[start : start + step].argsort(dim=-1, descending=True, stable=True)
        mask[start : start + step].scatter_(-1, order[:, :keep], True)
    return mask


def keep_above(scores: torch.Tensor, drop: int) -> torch.Tensor:
    """Drops the `drop` smallest of a vector. Uses two histograms of its bits, which order floats >= 0, instead of a sort."""
    if drop >= len(scores):
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    bits = scores.contiguous().view(torch.int32)
    pieces = bits.split(_CHUNK)
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=bits.device)
    high, smaller = _bin((piece >> 16 for piece in pieces), drop, counts)
    low, smaller_still = _bin((piece[piece >> 16 == high] & 0xFFFF for piece in pieces), drop - smaller, counts.zero_())
    threshold = (high << 16) | low
    mask = bits > threshold
    equal = (bits == threshold).nonzero().squeeze(-1)
    mask[equal[: len(equal) - (drop - smaller - smaller_still)]] = True
    return mask


def _bin(keys: Iterable[torch.Tensor], rank: int, counts: torch.Tensor) -> tuple[int, int]:
    """(the key, below 2^16, of the entry of rank `rank`; the number of entries with a smaller key); `counts` are zeros."""
    for piece in keys:
        counts += torch.bincount(piece, minlength=1 << 16)
    upto = counts.cumsum(0)
    found = min(int(torch.searchsorted(upto, rank, right=True)), (1 << 16) - 1)
    return found, int(upto[found] - counts[found])


def keep_first(group: torch.Tensor, keep: int) -> torch.Tensor:
    """bool mask of the `keep` largest of every column of a few rows [m, columns], by comparing each with each."""
    larger = group[:, None] > group
    ties = (group[:, None] == group) & torch.ones(len(group), len(group), dtype=torch.bool, device=group.device).triu_(1)[
        ..., None
    ]
    return (larger | ties).sum(0) < keep


def zeroed(value: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`value` with +0.0 where it is not kept; a kept -0.0 becomes +0.0 too, for some kernels count it as a number."""
    return value.masked_fill(~keep, 0).add_(0)


def holds(nonzero: torch.Tensor, sparsity: Sparsity) -> bool:
    """Whether `nonzero` [experts?, out, in] has the pattern: no group has too many, or each matrix has enough zeros."""
    if sparsity.of is not None:
        if nonzero.shape[-1] % sparsity.of:
            return False
        return bool((nonzero.unflatten(-1, (-1, sparsity.of)).sum(-1) <= (sparsity.kept or 0)).all())
    assert sparsity.fraction is not None
    rows, columns = nonzero.shape[-2:]
    zeros = (~nonzero).flatten(-2).sum(-1)
    # A share of each row, rounded down, may be less than that share of the matrix; both are accepted.
    return bool((zeros >= min(int(rows * columns * sparsity.fraction), rows * int(columns * sparsity.fraction))).all())
