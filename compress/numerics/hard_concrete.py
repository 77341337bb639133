"""Hard concrete: masks that are learned by gradients and end at exactly 0 or 1.

Louizos et al. (1712.01312), with the constants of CoFi and Sheared LLaMA (Xia et al., 2310.06694):

    s = sigmoid((ln u - ln(1 - u) + log a) / beta),  u ~ U(0, 1)
    z = clamp(s (zeta - gamma) + gamma, 0, 1),  beta = 2/3, gamma = -0.1, zeta = 1.1

Sheared LLaMA's code keeps log a above ln 0.01, so a mask that should be closed still counts as 0.047 open: to reach a target on
average, more masks than wanted have to close, and nearly 5 % of the parts that are kept are dead. At ln 0.0001 none are.
"""

from __future__ import annotations

import math

import torch

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LOWEST, HIGHEST = math.log(1e-4), math.log(100.0)
"""Bounds of log a."""
_EPS = 1e-6
_SHARPER = 0.8
"""Factor of log a / beta in the mask that is used in the end."""


def bounded(log_a: torch.Tensor, lowest: float = LOWEST) -> torch.Tensor:
    """log a within its bounds; gradients pass the bounds only towards the inside."""
    return log_a.clamp(lowest, HIGHEST)


def sampled(log_a: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """z for uniform numbers `u`."""
    u = u.clamp(_EPS, 1 - _EPS)
    s = ((u.log() - (1 - u).log() + log_a) / BETA).sigmoid()
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def score(log_a: torch.Tensor) -> torch.Tensor:
    """The probability that z is not 0."""
    return (1 - (BETA * math.log(-GAMMA / ZETA) - log_a).sigmoid()).clamp(_EPS, 1 - _EPS)


def settled(log_a: torch.Tensor) -> torch.Tensor:
    """z without noise, for what is kept in the end."""
    return (log_a / BETA * _SHARPER).sigmoid()


def constraint(log_a: torch.Tensor, sparsity: float, multipliers: torch.Tensor) -> torch.Tensor:
    """lambda (s - t) + phi (s - t)^2, the mean over rows, with s the expected sparsity of each row and t the wanted one.

    It is minimized by masks and maximized by the multipliers (lambda, phi).
    """
    gap = (1 - score(log_a).mean(-1)) - sparsity
    return (multipliers[0] * gap + multipliers[1] * gap.square()).mean()
