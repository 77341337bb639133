"""int4pack backend: torch's own product by 4-bit codes on the CPU.

Legend: N rows, K columns, g columns of a group; w = (code - 8) s + a, with s and a in bf16 [K / g, N, 2], as in torch.
Zero points z make a = (8 - z) s, which bf16 rounds; the rest r is multiplied by the sums of each group's inputs, a product
of width K / g, and added. So w is exactly the dequantized code.
Codes of 3 and 2 bits are held in 4 bits, shifted to the middle of the range, if the user asks for this backend by name.

torch packs codes in an order that depends on the CPU's instruction set, so they are packed when a model is loaded and never
stored. Blocks of up to 64 rows follow each other: byte (k, i) of a block [K, rows / 2] holds column k of two of its rows, in
its low and its high half. Which two is found by packing row numbers, and the result is verified on random codes. So codes can
be unpacked again for many tokens, where a dense product is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch

from compress.errors import Refusal
from compress.kernels.dispatch import Work
from compress.kernels.native.cpu import Cpu
from compress.kernels.native.packed import Packed
from compress.numerics.qtensor import with_beside

_GROUPS = (32, 64, 128, 256)
_BLOCK = 64
"""Rows that torch packs independently of others on every CPU, so that parts of this many rows can be concatenated."""
_TOKENS = 64
"""The most tokens for which torch's product is faster than expanding the weight first."""


class Int4pack(Cpu):
    """Integers of 4 bits in groups, in bf16."""

    name = "int4pack"
    keeps_columns: ClassVar[bool] = False
    multiple = _BLOCK

    def refuse(self, work: Work) -> None:
        super().refuse(work)
        scheme = work.state.scheme
        if scheme is None:
            raise Refusal("it is not in codes", "use another backend")
        if not (scheme.integer and scheme.bits <= 4 and scheme.group in _GROUPS):
            raise Refusal(f"{scheme} is not w4 in groups of {', '.join(map(str, _GROUPS))}", "use another backend")
        if scheme.minimum:
            raise Refusal(f"torch's product wants the values of code 8, which {scheme} has only rounded", "use another backend")
        if scheme.bits < 4 and not work.asked:
            raise Refusal(f"{scheme} would take 4 bits in memory", "ask for int4pack by name where speed is worth that")
        if work.dtype != torch.bfloat16 or work.scales != torch.bfloat16:
            raise Refusal("activations or scales are not in bfloat16, which alone is fast", "load the model in bfloat16")
        if work.rows % 16 or work.columns % scheme.group:
            raise Refusal(f"16 rows or whole groups do not divide {work.rows} x {work.columns}", "use another backend")
        if not work.multiplied:
            raise Refusal("its rows are looked up, and nothing is multiplied by it", "use another backend")
        if work.state.outliers is not None:
            raise Refusal("it has outliers", "use another backend")
        if not _known():
            raise Refusal("this torch packs codes in an order that is not known here", "use another backend")

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        parts = {name: part for name, part in packed.parts.items() if name not in ("tiles", "indices", "scale", "zero")}
        codes = torch.empty(packed.rows * packed.columns // 2, dtype=torch.uint8)
        scale = torch.zeros(packed.scheme.groups(packed.columns), packed.rows, 2, dtype=torch.bfloat16)
        if not packed.scheme.symmetric:
            parts["zero"] = torch.empty(scale.shape[:2], dtype=torch.uint8)
        for rows in self.chunks(packed):
            q = packed.take(rows)
            codes[_bytes(rows, packed)] = _pack(q.codes + _shift(packed))
            scale[:, rows, 0] = q.scale.T
            if q.zero is not None:
                parts["zero"][:, rows] = q.zero.T + _shift(packed)
                scale[:, rows, 1] = _added(q.scale.T, parts["zero"][:, rows])
        return {"int4": codes.view(packed.rows, -1), "scale_and_zero": scale, **parts}

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        scale = packed.parts["scale_and_zero"][:, rows, 0].contiguous()
        zero = None if packed.scheme.symmetric else packed.parts["zero"][:, rows]
        codes = _unpack(packed.parts["int4"].view(-1)[_bytes(rows, packed)], packed.columns)
        if dtype == torch.bfloat16 and packed.state.lowrank is None:
            # Codes are exact in bfloat16, so this also rounds only once, and moves half the bytes.
            dense: torch.Tensor = codes.to(dtype).unflatten(0, (len(scale), -1))
            return dense.sub_(8 if zero is None else zero[:, None]).mul_(scale[:, None]).flatten(0, 1).T
        zero = None if zero is None else zero.T - _shift(packed)
        q = with_beside(packed.state, codes.T - _shift(packed), scale.T, zero, packed.parts)
        if q.lowrank is not None:
            q = replace(q, lowrank=replace(q.lowrank, left=q.lowrank.left[rows]))
        return q.dequantize().to(dtype)

    def lookup(self, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        # Whole blocks are unpacked: expensive per row, but a token's product with all rows costs more.
        found, blocks = torch.empty(len(ids), packed.columns), ids // _BLOCK
        for block in blocks.unique().tolist():
            rows, here = slice(block * _BLOCK, min(packed.rows, (block + 1) * _BLOCK)), blocks == block
            found[here] = self.rows(packed, rows, torch.float32)[ids[here] - rows.start]
        return found

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        if len(x) > _TOKENS or x.dtype != torch.bfloat16:
            return super().linear(x, packed, bias, turned)
        parts = packed.parts
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), parts["int4"], packed.scheme.group, parts["scale_and_zero"]
        )
        if not packed.scheme.symmetric:
            scale, added = parts["scale_and_zero"].unbind(-1)
            sums = x.float().unflatten(1, (-1, packed.scheme.group)).sum(-1)
            out += sums @ (_added(scale, parts["zero"]) - added)
        if packed.state.lowrank is not None:
            out += packed.by_factors(x)
        return out if bias is None else out + bias


def _shift(packed: Packed) -> int:
    """The number to add to codes to get the 4-bit codes of the same values."""
    return 8 - packed.scheme.middle


def _added(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(8 - z) s, exact in fp32."""
    return (8 - zero.float()) * scale


def _bytes(rows: slice, packed: Packed) -> slice:
    """The slice of bytes that hold some rows; the first row begins a block."""
    return slice(rows.start * packed.columns // 2, rows.stop * packed.columns // 2)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [n, K], n a multiple of 16 -> uint8 [n K / 2] in torch's order."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed.view(-1)


def _unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `_pack`, transposed: uint8 [K, n]."""
    rows = 2 * len(packed) // columns
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    for start in range(0, rows, _BLOCK):
        part = codes[:, start : start + _BLOCK]
        for half, low, high in _blocks(part.shape[1]):
            taken, packed = packed[: columns * half].view(columns, half), packed[columns * half :]
            part[:, low] = taken & 15
            part[:, high] = taken >> 4
    return codes


@lru_cache(maxsize=8)
def _blocks(rows: int) -> tuple[tuple[int, slice, slice], ...]:
    """For each block of `rows` rows: (half of its rows, the rows in low halves of bytes, those in high halves)."""
    numbers = torch.arange(rows, dtype=torch.uint8)[:, None].expand(rows, 2)
    ones, sixteens = _pack(numbers & 15), _pack(numbers >> 4)
    low, high = (ones & 15) | (sixteens & 15) << 4, (ones >> 4) | (sixteens >> 4) << 4

    def found() -> Iterator[tuple[int, slice, slice]]:
        start = 0
        while start < rows:
            # The second column begins where the first row occurs again.
            again = (low[start + 1 :] == low[start]).nonzero()
            half = int(again[0]) + 1 if len(again) else rows - start
            yield half, _run(low[start : start + half]), _run(high[start : start + half])
            start += 2 * half

    return tuple(found())


def _run(numbers: torch.Tensor) -> slice:
    """Evenly spaced numbers as a slice; others make the check of `_known` fail."""
    first, step = int(numbers[0]), int(numbers[1]) - int(numbers[0])
    return slice(first, first + step * len(numbers), step)


@lru_cache(maxsize=1)
def _known() -> bool:
    """Whether random codes are the same after packing and unpacking."""
    generator = torch.Generator().manual_seed(0)
    for rows in (16, 48, 64, 208):
        codes = torch.randint(0, 16, (rows, 96), dtype=torch.uint8, generator=generator)
        try:
            if not torch.equal(_unpack(_pack(codes), 96).T, codes):
                return False
        except (AttributeError, IndexError, RuntimeError, ValueError):
            return False
    return True
