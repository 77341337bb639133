"""int8pack backend: torch's own product by int8 rows on the CPU.

Codes are kept as int8 [rows, columns], less the middle code, in plain order; each row has one scale.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from compress.errors import Refusal
from compress.kernels.dispatch import Work
from compress.kernels.native.cpu import Cpu
from compress.kernels.native.packed import Packed
from compress.numerics.qtensor import with_beside

_TOKENS = 16
"""The most tokens for which torch's product is faster than expanding the weight first."""


class Int8pack(Cpu):
    """Symmetric integers of 8 bits with a scale per row, in bf16."""

    name = "int8pack"
    keeps_columns: ClassVar[bool] = False

    def refuse(self, work: Work) -> None:
        super().refuse(work)
        scheme = work.state.scheme
        if scheme is None:
            raise Refusal("it is not in codes", "use another backend")
        if not (scheme.integer and scheme.bits == 8 and scheme.symmetric and scheme.group is None):
            raise Refusal(f"{scheme} is not symmetric w8 with a scale per row", "use another backend")
        if work.dtype != torch.bfloat16 or work.scales != torch.bfloat16:
            raise Refusal("activations or scales are not in bfloat16, which alone is fast", "load the model in bfloat16")
        # torch reads 16 columns at a time, even beyond the end.
        if work.columns % 16:
            raise Refusal(f"16 does not divide {work.columns} columns", "use another backend")
        if work.looked_up:
            raise Refusal("its rows are looked up as well", "use another backend")
        if work.state.outliers is not None or work.state.lowrank is not None:
            raise Refusal("it has outliers or low-rank factors", "use another backend")

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        codes = torch.empty(packed.rows, packed.columns, dtype=torch.int8)
        scale = torch.empty(packed.rows, dtype=torch.bfloat16)
        for rows in self.chunks(packed):
            q = packed.take(rows)
            codes[rows], scale[rows] = (q.codes ^ 128).view(torch.int8), q.scale[:, 0]
        return {"int8": codes, "scale": scale}

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        codes, scale = packed.parts["int8"][rows].view(torch.uint8) ^ 128, packed.parts["scale"][rows, None]
        return with_beside(packed.state, codes, scale, None, packed.parts).dequantize().to(dtype)

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        if len(x) > _TOKENS or x.dtype != torch.bfloat16:
            return super().linear(x, packed, bias, turned)
        out: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), packed.parts["int8"], packed.parts["scale"])
        return out if bias is None else out + bias
