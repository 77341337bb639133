"""SparseGPT: zeroes entries column by column, later columns making up for them.

Frantar & Alistarh, 2301.00774. Legend: W [rows, n] weights, Q what becomes of them, D = W - Q; H, lambda, R, F as in hessian.py.

Columns are taken in turn. What the columns from k on would best become, when those before are fixed, is their target: W at first,
and once a column is solved, its error e_k = t_k - q_k moves the targets after it, the paper's update by the inverse of H:
    q_k = t_k where it is kept, else 0,    t_j -= e_k V_kj,    V = F^-1,
    trace(D (H + lambda I) D^T) = sum_k R_kk^2 |e_k|^2.
So the zero of an entry adds t^2 R_kk^2 to the loss, the paper's w^2 / [H^-1]_kk, and the entries that add least are dropped: a
share of every block of columns when the block is reached, or for n:m some of each m inputs when the first of these is.

V is needed inside blocks only: a block's targets at its start are W + V^T F^T D, with the D of blocks before it. Everything is
computed on W^T, where a column is contiguous; inside a block errors are carried on by halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.numerics.gptq import turns
from compress.numerics.hessian import Factor
from compress.numerics.masks import keep_above, keep_first, keep_in_rows
from compress.spec.sparsity import Sparsity

BLOCK = 128
"""Columns among which a share of zeros is chosen."""
_LEAF = 16
"""Columns below which a block is no longer halved."""


def prune(
    w: torch.Tensor, factor: Factor, sparsity: Sparsity, *, per_row: bool = False, block: int = BLOCK, heights: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q fp32, bool mask of what is kept), both [rows, n], for inputs whose second moments are in `factor`.

    A share of zeros is exactly int(p n) of the n entries of a matrix, or with `per_row` of a row; `heights` are the rows of
    each matrix, if `w` is several that read the same inputs. For n:m, `factor` keeps the m columns of a group together.
    """
    rows, n = w.shape
    order, m = factor.order, sparsity.of
    # Transposed copies; d is W, and W - Q in each column that has been solved.
    d = w.T.to(factor.feedback.dtype, copy=True, memory_format=torch.contiguous_format)
    d[factor.dead] = 0
    if order is not None:
        d = d[order]
    q, keep = torch.empty_like(d), torch.empty(d.shape, dtype=torch.bool, device=d.device)
    f, pivots = factor.feedback, factor.pivots
    width = block if m is None else max(m, block // m * m)
    for start in range(0, n, width):
        ks = slice(start, min(n, start + width))
        one = torch.eye(ks.stop - start, dtype=f.dtype, device=f.device)
        v = torch.linalg.solve_triangular(f[ks, ks], one, upper=True, unitriangular=True)
        target = torch.addmm(d[ks], v.T, f[:start, ks].T @ d[:start], out=q[ks])
        if m is None:
            keep[ks] = _keep_share(
                target.square() * pivots[ks, None], start, sparsity.fraction or 0.0, per_row, heights or [rows]
            )
        _columns(target, keep[ks], v, pivots[ks], sparsity)
        d[ks] -= target.masked_fill_(~keep[ks], 0)
    if order is not None:
        back = order.argsort()
        q, keep = q[back], keep[back]
    return q.T, keep.T


def _keep_share(cost: torch.Tensor, start: int, share: float, per_row: bool, heights: Sequence[int]) -> torch.Tensor:
    """bool mask of `cost` [columns, rows], of the columns from `start` on; over all blocks int(p n) of n entries are dropped."""
    stop = start + len(cost)
    if per_row:
        return keep_in_rows(cost.T, stop - int(stop * share) - (start - int(start * share))).T
    parts = [
        keep_above(part.reshape(-1), int(height * stop * share) - int(height * start * share)).view(part.shape)
        for height, part in zip(heights, cost.split(list(heights), dim=1), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _columns(target: torch.Tensor, keep: torch.Tensor, v: torch.Tensor, pivots: torch.Tensor, sparsity: Sparsity) -> None:
    """Moves the targets of a block's columns in turn; for n:m `keep` is chosen on the way."""
    m = sparsity.of
    errors = torch.empty_like(target)
    rows, lost = target.unbind(0), errors.unbind(0)
    coefficients = v.T.contiguous()
    for start, middle, end in turns(0, len(target), m or _LEAF, m or 1):
        if middle > start:
            target[middle:end].addmm_(coefficients[middle:end, start:middle], errors[start:middle], alpha=-1)
            continue
        if m is not None:
            keep[start:end] = keep_first(target[start:end].square() * pivots[start:end, None], sparsity.kept or 0)
        dropped = (~keep[start:end]).to(target.dtype).unbind(0)
        earlier = errors[start:end].T
        for k in range(start, end):
            if k > start:
                rows[k].addmv_(earlier[:, : k - start], coefficients[k, start:k], alpha=-1)
            torch.mul(rows[k], dropped[k - start], out=lost[k])
