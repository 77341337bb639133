"""SignSGD: each number moves by its rate against the sign of its gradient.

Bernstein et al., 1802.04434.
"""

from __future__ import annotations

from typing import Any

import torch


class SignSGD(torch.optim.Optimizer):
    """Without momentum and state: a run that goes on needs nothing but the numbers."""

    def __init__(self, params: Any, lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
