"""Features: how far a student's hidden states are from its teacher's.

Legend: s student, t teacher, both [tokens, channels] of one layer; P a projection; a the inputs of a down projection; n(x) is x
divided by its root mean square over channels.

    SquareHead   mean((s - t)^2) / (mean(t^2) + eps), means over tokens and channels; summed over layers
    projected    mean over channels of (P n(s) - n(t))^2
    intra-class  the same between a token's s and the t of its nearest neighbours among tokens of its class
    density      a^2 / (a^2 + eps): a smooth share of entries that are not zero

Every function returns a sum over tokens, in fp32 or fp64, so that parts of a batch add up. Papers: 2310.06927 (SquareHead),
2407.14679 (projected), 2402.01911 (density).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

PAPER_EPS, PARITY_EPS = 0.0078125, 1e-8
"""bf16's machine epsilon, as SquareHead was released with; and one that mutes no layer of small activations."""
DENSITY_EPS = 1e-7
_ROWS = 1024
"""Tokens whose distances to all tokens are in memory together."""


def square_sum(states: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of a state's mean square."""
    return _exact(states).square().mean(-1).sum()


def squarehead_sum(student: torch.Tensor, teacher: torch.Tensor, mean_square: torch.Tensor, eps: float) -> torch.Tensor:
    """SquareHead's numerator, summed over tokens, over its denominator; `mean_square` is mean(t^2), or an estimate of it."""
    return (_exact(student) - _exact(teacher)).square().mean(-1).sum() / (mean_square + eps)


def projected_sum(student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """The squared distance of projected states; projection [teacher's channels, student's channels]."""
    return (_unit(student) @ projection.T - _unit(teacher)).square().mean(-1).sum()


def intra_class_sum(
    student: torch.Tensor, teacher: torch.Tensor, projection: torch.Tensor, classes: torch.Tensor, neighbours: int
) -> torch.Tensor:
    """Each token's squared distances, of its s to the t of up to `neighbours` other tokens of its class, nearest by their t.

    A class with few tokens has fewer neighbours; no other class is cut to that number.
    """
    target, total = _unit(teacher.detach()), student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    own, most = _unit(student) @ projection.T, min(neighbours, len(classes) - 1)
    if most < 1:
        return total
    numbers = torch.arange(len(classes), device=classes.device)
    for rows in numbers.split(_ROWS):
        other = (classes[rows, None] != classes) | (rows[:, None] == numbers)
        found = torch.cdist(target[rows], target).masked_fill(other, torch.inf).topk(most, largest=False)
        lost = (own[rows, None] - target[found.indices]).square().mean(-1)
        total = total + lost.masked_fill(found.values.isinf(), 0.0).sum()
    return total


def density_sum(inputs: torch.Tensor, eps: float = DENSITY_EPS) -> torch.Tensor:
    """The density of each token's inputs, from 0 to below 1; |a| far below sqrt(eps) counts as zero."""
    squares = _exact(inputs).square()
    return (squares / (squares + eps)).mean(-1).sum()


def again(function: Callable[..., torch.Tensor], *values: Any) -> torch.Tensor:
    """A function's value, which is computed again in the backward pass: only its arguments are kept until then."""
    found: torch.Tensor = checkpoint(function, *values, use_reentrant=False, preserve_rng_state=False)
    return found


def _exact(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _unit(states: torch.Tensor) -> torch.Tensor:
    exact = _exact(states)
    return exact * (exact.square().mean(-1, keepdim=True) + PARITY_EPS).rsqrt()
