"""cublas backend: expands rows, then multiplies densely; for many tokens.

The number of rows expanded at a time keeps the dense part small, but each product large.
"""

from __future__ import annotations

import torch

from compress.kernels.cuda.variant import Variant
from compress.kernels.dispatch import Backend, Work
from compress.kernels.native.cuda import Cuda, dense_variants, expanded
from compress.kernels.native.packed import Packed

_WEIGHTS = 1 << 26
"""Weights that are expanded at a time: 128 MiB."""


class Cublas(Cuda):
    """Runs every Kind."""

    name = "cublas"

    def variants(self, work: Work) -> list[Variant]:
        return dense_variants(work)

    def product(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        out = x.new_empty(len(x), packed.rows)
        for rows in self.chunks(packed, _WEIGHTS):
            dense = expanded(packed, rows, x.dtype).T
            if bias is None:
                torch.mm(x, dense, out=out[:, rows])
            else:
                torch.addmm(bias[rows].to(x.dtype), x, dense, out=out[:, rows])
        return out

    def grouped(self, x: torch.Tensor, packed: Packed, offsets: torch.Tensor) -> torch.Tensor:
        # Expert by expert, because all would not fit expanded; the numbers of rows are read back from the GPU.
        return Backend.grouped(self, x, packed, offsets)
