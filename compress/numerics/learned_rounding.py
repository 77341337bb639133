"""Learned rounding: codes and scales as functions of what a gradient can move.

The values that a scheme's codes can have, before they are scaled, are t_0 < t_1 < ...: code - zero for integers, the code itself
with a minimum m, else the grid. A weight W with scale s lies at a position a among them: t_i at i, and between two of them in
proportion. Then
    w' = s g t_i + m,  i = round(a + o)
with an offset o for each weight, and a gain g for each scale, which are 0 and 1 at first. SignRound (2309.05516; there V, alpha
and beta) moves both against the signs of their gradients, Block-AP (2407.11062) by AdamW. Rounding passes gradients on unchanged:
dL/do is dL/dw' times the step that w' takes to its neighbour, dL/dg the sum of dL/dw' s t_i over what shares the scale.

Codes need not be those nearest to W: GPTQ's make up for errors of other columns. Where W lies outside of the cell of its code,
[i - 1/2, i + 1/2], the position is the middle of the cell: at its edge the first step, whatever its gradient, would undo what
GPTQ has chosen. Without a step nothing changes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from compress.numerics.floats import decode
from compress.numerics.input_rotation import rotated
from compress.numerics.qtensor import QTensor
from compress.numerics.scales import blocked, spread
from compress.spec.scheme import Scheme

_INSIDE = 0.499
"""Half a cell, but for what fp32 might round out of it."""


@lru_cache(maxsize=64)
def _grid(scheme: Scheme, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ascending values, the code of each, the place of each code among them); NaN and the second zero have no value."""
    codes = torch.arange(scheme.levels, dtype=torch.uint8)
    values = decode(codes, scheme)
    fine = values.isfinite() & ~((values == 0) & values.signbit())
    order = values[fine].argsort()
    ascending, kept = values[fine][order], codes[fine][order]
    places = torch.searchsorted(ascending, values.nan_to_num(0.0, 0.0, 0.0) + 0.0)
    return ascending.to(device), kept.to(device), places.to(device)


def places(q: QTensor) -> torch.Tensor:
    """The number i of each code among its values, fp32 [experts?, rows, columns]: for integers the code."""
    if q.scheme.whole:
        return q.codes.float()
    return _grid(q.scheme, q.codes.device)[2].index_select(0, q.codes.flatten().int()).view(q.codes.shape).float()


def codes_at(i: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """uint8 codes at the places `i`, the inverse of `places`."""
    if scheme.whole:
        return i.to(torch.int16).to(torch.uint8)
    return _grid(scheme, i.device)[1].index_select(0, i.flatten().int()).view(i.shape)


def last_place(scheme: Scheme, device: torch.device) -> int:
    """The number of the largest value."""
    return scheme.levels - 1 if scheme.whole else len(_grid(scheme, device)[0]) - 1


def values_at(i: torch.Tensor, scheme: Scheme, zero: torch.Tensor | None) -> torch.Tensor:
    """The values at the places `i`, before they are scaled."""
    if not scheme.whole:
        return _grid(scheme, i.device)[0].index_select(0, i.flatten().int()).view(i.shape)
    if scheme.minimum:
        return i.clone()
    return i - scheme.middle if zero is None else i - spread(zero.float(), scheme, *i.shape[-2:])


def positions(q: QTensor, dense: torch.Tensor | None) -> torch.Tensor:
    """Positions a of weights in the cells of their codes, fp32 [experts?, rows, columns]; the cells' middles without weights.

    What outliers and low-rank factors add to the codes is not theirs to make up for: it is taken out of `dense`.
    """
    i = places(q)
    if dense is None:
        return i
    rows, columns = i.shape[-2:]
    x = dense.float() if q.lowrank is None else dense.float() - q.lowrank.product()
    x = rotated(x, q.scheme.hadamard)
    if q.minimum is not None:
        x = x - spread(q.minimum.float(), q.scheme, rows, columns)
    x = x / spread(q.steps(), q.scheme, rows, columns)
    inside = x - values_at(i, q.scheme, q.zero)
    if not q.scheme.whole:
        ascending = _grid(q.scheme, i.device)[0]
        gaps = torch.cat([ascending.diff(), ascending.new_ones(1)])
        above = gaps.index_select(0, i.flatten().int()).view(i.shape)
        below = gaps.index_select(0, (i - 1).clamp(min=0).flatten().int()).view(i.shape)
        inside = inside / torch.where(inside > 0, above, below)
    # Weights of a group of zeros, whose scale means nothing, stay at their codes.
    inside = inside.nan_to_num(0.0)
    return i + inside.masked_fill(inside.abs() > 0.5, 0.0).clamp(-_INSIDE, _INSIDE)


class LearnedRounding(torch.autograd.Function):
    """w' [experts?, rows, columns] in fp32, rounded to the stored dtype; gradients of offsets and of scales."""

    @staticmethod
    def forward(
        ctx: Any, offset: torch.Tensor, scale: torch.Tensor, position: torch.Tensor, zero: torch.Tensor | None,
        minimum: torch.Tensor | None, scheme: Scheme, stored: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """`scale` are fp32 steps, on the stored dtype's grid, with their gains."""
        moved = position + offset
        i = moved.round().clamp_(0, last_place(scheme, position.device))
        rows, columns = i.shape[-2:]
        values = values_at(i, scheme, zero)
        ctx.save_for_backward(values, scale, moved)
        ctx.scheme = scheme
        w = values * spread(scale.float(), scheme, rows, columns)
        if minimum is not None:
            w += spread(minimum.float(), scheme, rows, columns)
        return w.to(stored).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, scale, moved = ctx.saved_tensors
        scheme, (rows, columns) = ctx.scheme, values.shape[-2:]
        grad = grads[0].float()
        to_offset = to_scale = None
        if ctx.needs_input_grad[1]:
            to_scale = blocked(values * grad, scheme).sum(-1).sum(-2).to(scale.dtype)
        if ctx.needs_input_grad[0]:
            last = last_place(scheme, moved.device)
            # Beyond the last value an offset changes nothing, but may lead back.
            outside = ((moved > last + 0.5) & (grad < 0)) | ((moved < -0.5) & (grad > 0))
            to_offset = grad * spread(scale.float(), scheme, rows, columns)
            if not scheme.whole:
                ascending = _grid(scheme, moved.device)[0]
                gaps = torch.cat([ascending.diff(), ascending[-1:] - ascending[-2:-1]])
                at = moved.floor().clamp_(0, last).flatten().int()
                to_offset *= gaps.index_select(0, at).view(moved.shape)
            to_offset.masked_fill_(outside, 0.0)
        return to_offset, to_scale, None, None, None, None, None
