"""Norms: root mean square of each input of a layer over the calibration tokens.

Legend: x [tokens, n] inputs. Sums of squares are in fp64, because many batches are added.
"""

from __future__ import annotations

import torch


class InputNorms:
    """Accumulates sum x_j^2 for every input j. Sums are additive over processes."""

    def __init__(self, width: int) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs [tokens, width] of any float dtype."""
        self.squares += x.float().square().sum(0, dtype=torch.float64)
        self.tokens += len(x)

    def parts(self) -> list[torch.Tensor]:
        """The sums, to be added up over processes in place."""
        return [self.squares]

    def rms(self) -> torch.Tensor:
        """Root mean square of every input [width], fp32. Raises ValueError if an input was not finite."""
        found = (self.squares / max(1, self.tokens)).sqrt().float()
        if not bool(torch.isfinite(found).all()):
            raise ValueError("an input was not finite")
        return found
