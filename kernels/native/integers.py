"""integers backend: whole numbers by whole numbers on the CPU, summed in int32.

Legend: x = s (q - z) per token, with q in int8 or int4 (numerics/inputs.py); w = t c per row, with c = code - middle code;
y = s t (sum_k q_k c_k - z sum_k c_k), in which only the last two products are rounded. Kept columns are products of their own:
plain ones, or int8 by int8.

It rounds inputs by itself, because q cannot be told from s (q - z). Codes are kept as int8 [rows, columns], in plain order, and
the sums of their rows: faster than to expand them, but twice the memory where codes have 4 bits. So it takes what has kept
columns, and other weights only if it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch.nn.functional import linear

from compress.errors import Refusal
from compress.kernels.dispatch import Work
from compress.kernels.native.cpu import Cpu
from compress.kernels.native.packed import Packed
from compress.numerics.inputs import in_integers
from compress.numerics.qtensor import with_beside


class Integers(Cpu):
    """Symmetric integers with a scale per row, and activations in integers."""

    name = "integers"
    rounds_inputs: ClassVar[bool] = True
    keeps_columns: ClassVar[bool] = True

    def refuse(self, work: Work) -> None:
        super().refuse(work)
        scheme = work.state.scheme
        if scheme is None or not scheme.inputs.startswith("int"):
            raise Refusal(f"{work.state} does not round activations to integers", "use another backend")
        if not (scheme.integer and scheme.symmetric and scheme.group is None):
            raise Refusal(f"{scheme} is not symmetric with a scale per row", "use another backend")
        if work.looked_up:
            raise Refusal("its rows are looked up as well", "use another backend")
        if work.state.outliers is not None or work.state.lowrank is not None:
            raise Refusal("it has outliers or low-rank factors", "use another backend")
        if work.state.columns is None and not work.asked:
            wide = scheme.bits < 8
            reason = f"{scheme} would take 8 bits in memory" if wide else "int8pack and cpu come first for such weights"
            raise Refusal(reason, "ask for integers by name where speed is worth that")

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        codes = torch.empty(packed.rows, packed.columns, dtype=torch.int8)
        scale = torch.empty(packed.rows, dtype=packed.parts["scale"].dtype)
        for rows in self.chunks(packed):
            q = packed.take(rows)
            # In bytes the subtraction wraps to the right code.
            codes[rows], scale[rows] = (q.codes - q.scheme.middle).view(torch.int8), q.scale[:, 0]
        kept = {name: part for name, part in packed.parts.items() if name.startswith("kept_")}
        if kept:
            codes[:, kept["kept_columns"].long()] = 0
        return {"int8": codes, "scale": scale, "sums": codes.sum(1, dtype=torch.int32), **kept}

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        codes = packed.parts["int8"][rows].view(torch.uint8) + packed.scheme.middle
        q = with_beside(packed.state, codes, packed.parts["scale"][rows, None], None, packed.parts)
        return replace(q, kept=None if q.kept is None else q.kept.take(rows)).dequantize().to(dtype)

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        parts, scheme = packed.parts, packed.scheme
        columns = parts["kept_columns"].long() if "kept_columns" in parts else None
        rest = x if columns is None else x.index_fill(-1, columns, 0)
        q, s, z = in_integers(rest, scheme.input_bits, scheme.inputs.endswith("-asym"))
        total = torch._int_mm(q.to(torch.int8), parts["int8"].T)
        if z is not None:
            total -= z.to(torch.int32) * parts["sums"]
        out = total.float() * s.float() * parts["scale"].float()
        if columns is not None:
            out += _kept(x[:, columns], parts)
        return (out if bias is None else out + bias.float()).to(x.dtype)


def _kept(x: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The product of kept inputs [tokens, k] by their columns, fp32 [tokens, rows]."""
    values = parts["kept_values"]
    if "kept_scale" not in parts:
        return linear(x.float(), values.float())
    q, s, _ = in_integers(x, 8)
    return torch._int_mm(q.to(torch.int8), values.T).float() * s.float() * parts["kept_scale"].float().T
