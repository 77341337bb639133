"""Smoothing: scales for channels of an activation, so that weights round well.

Legend: x [tokens, n] inputs of weights W [out, n]; s [n] > 0: x becomes x / s and W becomes W s, column by column, which
changes no output until W is rounded to Q(W s). H = mean of x x^T; D = Q(W s) / s - W, and trace(D H D^T) is the mean squared
error of the outputs, per token.

AWQ (Lin et al., 2306.00978): s = (mean |x|)^r / sqrt(max * min of it), with the r of least cost.
SmoothQuant (Xiao et al., 2211.10438): s = max |x|^a / max |W|^(1-a).
"""

from __future__ import annotations

import torch

from compress.numerics.hessian import Hessian
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme

_LEAST = 1e-4
"""Lower bound of a channel's magnitude, so that a channel that is always zero gets a finite scale."""


class Activity(Hessian):
    """Accumulates x x^T and sum |x|. Sums are additive over processes."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.sums = torch.zeros(width, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        super().add(x)
        self.sums += x.float().abs().sum(0, dtype=torch.float64)

    def parts(self) -> list[torch.Tensor]:
        return [*super().parts(), self.sums]

    def magnitudes(self) -> torch.Tensor:
        """mean |x| [n], fp32; must be called before `mean`. Raises ValueError if an input was not finite."""
        return _finite(self.sums / max(1, self.tokens))


class Extents:
    """Keeps max |x|, which is no sum."""

    def __init__(self, width: int) -> None:
        self.peaks = torch.zeros(width)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs [tokens, width] of any float dtype."""
        if len(x):
            self.peaks = torch.maximum(self.peaks, x.abs().amax(0).float())
        self.tokens += len(x)

    def parts(self) -> list[torch.Tensor]:
        """Empty: there are no sums."""
        return []

    def maxima(self) -> list[torch.Tensor]:
        """What processes must combine by the maximum."""
        return [self.peaks]

    def largest(self) -> torch.Tensor:
        """max |x| [n], fp32. Raises ValueError if an input was not finite."""
        return _finite(self.peaks)


def _finite(x: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(x).all()):
        raise ValueError("an input was not finite")
    return x.float()


def by_activity(magnitudes: torch.Tensor, ratio: float) -> torch.Tensor:
    """AWQ's s [n] from mean |x| [n]."""
    s = magnitudes.clamp(min=_LEAST) ** ratio
    return s / (s.max() * s.min()).sqrt()


def by_extents(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """SmoothQuant's s [n] from max |x| and max |W| of the columns [n]."""
    return inputs.clamp(min=_LEAST) ** alpha / weights.clamp(min=_LEAST) ** (1 - alpha)


def cost(w: torch.Tensor, s: torch.Tensor, h: torch.Tensor, scheme: Scheme, dtype: torch.dtype, clip: str) -> float:
    """trace(D H D^T) of `w` [out, n], multiplied by `s` and rounded to nearest; fp32 values of a weight of `dtype`."""
    d = nearest(w * s, scheme, dtype, clip).q.dequantize().div_(s).sub_(w)
    return float(((d @ h) * d).sum(dtype=torch.float64))
