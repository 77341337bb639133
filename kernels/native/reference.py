"""Reference backend: dequantizes the whole weight, then multiplies densely."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import linear

from compress.kernels.dispatch import Backend
from compress.kernels.native.packed import Packed


class Reference(Backend):
    """Runs everything everywhere; the weight is dense while it multiplies."""

    name = "reference"
    keeps_columns: ClassVar[bool] = True

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        dense = packed.values().to(x.dtype)
        return linear(x, dense.mT if turned else dense, bias)
