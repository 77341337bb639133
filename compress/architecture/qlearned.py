"""QLearned: a module whose codes and scales a gradient moves.

What moves them: numerics/learned_rounding.py.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.architecture.qlinear import QLinear
from compress.numerics.learned_rounding import LearnedRounding, codes_at, last_place


class QLearned(QLinear):
    """Mixed into the class of a module in codes by `with_offsets`. Of the codes' shape: buffer position, parameter offset."""

    position: torch.Tensor
    offset: nn.Parameter

    def expand(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The weight that the codes would have if they were rounded now."""
        factors = self.factors()
        stored = self.stored_dtype if self.rounded_at_once(factors) else torch.float32
        dense: torch.Tensor = LearnedRounding.apply(  # type: ignore[no-untyped-call]
            self.offset, self.current_scale(), self.position, self.zero, self.minimum, self.scheme, stored
        )
        if (outliers := self.outliers()) is not None:
            dense = outliers.put(dense)
        dense = dense.to(self.compute_dtype) if self.rounded_at_once(factors) else self.completed(dense, factors)
        return dense if rows is None else dense[rows]


def with_offsets(module: QLinear, position: torch.Tensor) -> dict[str, nn.Parameter]:
    """Makes codes trainable from these positions; returns parameters by name: offset, and gain where scales can move."""
    cls = type(module)
    module.__class__ = type(f"Learned{cls.__name__}", (QLearned, cls), {})
    found = {"offset": nn.Parameter(torch.zeros_like(position)), **module.gains()}
    module.register_buffer("position", position)
    for name, parameter in found.items():
        module.register_parameter(name, parameter)
    return found


def codes_of(module: QLearned, offset: torch.Tensor) -> torch.Tensor:
    """The codes uint8 that an offset gives."""
    position = module.position.to(offset.device)
    return codes_at((position + offset).round().clamp_(0, last_place(module.scheme, offset.device)), module.scheme)
