"""integers backend: whole numbers by whole numbers on the CPU, summed in int32.

Legend: x = s (q - z), with q in int8 or int4; w = t (c - o) for a code c and its zero point o; y = sum over groups of
s t (sum_k q_k (c_k - o) - z sum_k (c_k - o)), in which only products by s and t are rounded. Kept columns are products of their
own: plain ones, or int8 by int8.

It rounds inputs by itself, because q cannot be told from s (q - z): as the scheme does (numerics/inputs.py), or, for a scheme
that does not and only if it is asked for, to int8 with a scale for each token and SPAN columns. Codes take as many bytes as
they are stored in, in the order that kernels/cpu/integers.cpp tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch.nn.functional import linear, pad

from compress.errors import Refusal
from compress.kernels.cpu.library import DTYPES, SCALES, CRounding, library
from compress.kernels.dispatch import Backend, Work
from compress.kernels.native.fused import deltas
from compress.kernels.native.packed import Packed
from compress.kernels.native.simd import weight_of
from compress.kernels.native.tiles import low_bits
from compress.numerics.inputs import in_integers
from compress.numerics.qtensor import with_beside

BLOCK, LANES = 32, 16
"""Columns and rows of a block."""
SPAN = 64
"""The most columns of a token that share a scale where the scheme does not say; a power of two."""


class Integers(Backend):
    """Integers in groups of 32, 64, 128, ..., or with a scale per row."""

    name = "integers"
    rounds_inputs: ClassVar[bool] = True
    keeps_columns: ClassVar[bool] = True

    def refuse(self, work: Work) -> None:
        scheme, state = work.state.scheme, work.state
        if work.device != "cpu":
            raise Refusal(f"the weight lies on {work.device}", "load the model on the CPU")
        rounded = scheme is not None and (scheme.inputs.startswith("int") or (work.asked and not scheme.inputs))
        if scheme is None or not rounded:
            raise Refusal(f"{state} does not round activations to integers", "ask for integers by name if they may be rounded")
        if not scheme.integer or scheme.minimum:
            raise Refusal(f"{scheme} is not in integers with zero points or none", "use another backend")
        group = scheme.group or BLOCK
        if group < BLOCK or group & (group - 1):
            raise Refusal(f"groups of {group} columns are no power of two from {BLOCK} on", "use another backend")
        if scheme.inputs and (state.outliers is not None or state.lowrank is not None):
            raise Refusal("outliers or low-rank factors would be multiplied by unrounded activations", "use another backend")
        if work.turned:
            raise Refusal("a Conv1D adds over its rows", "leave the backend to be chosen")
        if work.dtype not in DTYPES or work.scales not in SCALES:
            raise Refusal(f"activations are {str(work.dtype)[6:]}, scales {str(work.scales)[6:]}", "use cpu or reference")
        library()

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        packed = packed.whole()
        parts, bits = dict(packed.parts), packed.scheme.bits
        shape = -(-packed.rows // LANES), -(-packed.columns // BLOCK), bits, LANES, 4
        parts["tiles"] = blocks = torch.empty(shape, dtype=torch.uint8)
        if packed.scheme.inputs.endswith("-asym"):
            parts["sums"] = torch.empty(packed.rows)
        for rows in self.chunks(packed):
            q = packed.take(rows)
            blocks[rows.start // LANES : -(-rows.stop // LANES)] = in_blocks(q.codes, bits)
            if "sums" in parts:
                parts["sums"][rows] = q.values().sum(1)
        if packed.state.outliers is not None:
            parts["outlier_deltas"] = deltas(packed)
        return parts

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        return _expanded(packed, rows, rows.stop - rows.start).to(dtype)

    def lookup(self, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        return _expanded(packed, ids, len(ids))

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        if packed.state.columns is not None:
            return _with_kept(x, packed, bias)
        out = x.new_empty(x.shape[0], packed.rows)
        library().integers(weight_of(packed), rounding(packed), x, None if bias is None else bias.to(x.dtype).contiguous(), out)
        return out if packed.state.lowrank is None else out.add_(packed.by_factors(x))

    def grouped(self, x: torch.Tensor, packed: Packed, offsets: torch.Tensor) -> torch.Tensor:
        # What is beside codes belongs to single matrices.
        if packed.state.beside():
            return super().grouped(x, packed, offsets)
        x, out = x.contiguous(), x.new_empty(len(x), packed.rows)
        library().integers(weight_of(packed), rounding(packed), x, None, out, offsets.int().contiguous())
        return out


def in_blocks(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [rows, columns] as [tiles, blocks, bits, 16, 4], zeros where there are none; see integers.cpp."""
    rows, columns = codes.shape
    padded = pad(codes, (0, -columns % BLOCK, 0, -rows % LANES))
    steps = padded.view(-1, LANES, padded.shape[1] // BLOCK, 8, 4).permute(0, 2, 3, 1, 4)
    low = low_bits(bits)
    parts = [_joined(steps & ((1 << low) - 1), low)] + ([_joined(steps >> low, bits - low)] if bits > low else [])
    return torch.cat(parts, 2)


def _joined(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of some bits, uint8 [tiles, blocks, 8, 16, 4], those of 8 / bits steps in a byte."""
    tiles, blocks = steps.shape[:2]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None, None]
    return (steps.reshape(tiles, blocks, bits, 8 // bits, LANES, 4) << shifts).sum(3, dtype=torch.uint8)


def rounding(packed: Packed) -> CRounding:
    """How inputs of a weight are rounded, as the library gets it; made once."""
    if (made := packed.made.get("rounding")) is None:
        inputs, sums = packed.scheme.inputs, packed.parts.get("sums")
        made = packed.made["rounding"] = CRounding(
            None if sums is None else sums.data_ptr(), 4 if inputs.startswith("int4") else 8, sums is not None,
            0 if inputs else SPAN, packed.state.columns is not None,
        )  # fmt: skip
    return made


def _expanded(packed: Packed, rows: slice | torch.Tensor, count: int) -> torch.Tensor:
    """Some rows, fp32 [count, columns], with all that is beside codes."""
    values = torch.empty(count, packed.columns)
    library().expand(weight_of(packed), rows, values, integers=True)
    q = with_beside(packed.state, values, packed.parts["scale"], None, dict(packed.parts))
    index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    values = values if q.outliers is None else q.outliers.take(index).put(values)
    values = values if q.kept is None else q.kept.take(index).put(values)
    return values if q.lowrank is None else values.add_(replace(q.lowrank, left=q.lowrank.left[index]).product())


def _with_kept(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of a weight with kept columns, whose inputs are not rounded with the others."""
    columns, out = packed.parts["kept_columns"].long(), torch.empty(len(x), packed.rows)
    library().integers(weight_of(packed), rounding(packed), x.index_fill(-1, columns, 0), None, out)
    out += _kept(x[:, columns], packed.parts)
    return (out if bias is None else out.add_(bias.float())).to(x.dtype)


def _kept(x: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The product of kept inputs [tokens, k] by their columns, fp32 [tokens, rows]."""
    values = parts["kept_values"]
    if "kept_scale" not in parts:
        return linear(x.float(), values.float())
    q, s, _ = in_integers(x, 8)
    return torch._int_mm(q.to(torch.int8), values.T).float() * s.float() * parts["kept_scale"].float().T
