"""triton backend: multiplies tiles by Triton, for tens to hundreds of tokens.

Under TRITON_INTERPRET=1 it runs on a CPU, slowly, to check the kernels' results; their PTX is not run there.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from compress.errors import Refusal
from compress.kernels.cuda import device
from compress.kernels.dispatch import Work
from compress.kernels.native import ptx, tiles
from compress.kernels.native.blocks import block_map
from compress.kernels.native.fused import Fused, kind_of, scales, shift
from compress.kernels.native.kind import Kind
from compress.kernels.native.kind import table as values
from compress.kernels.native.packed import Packed

_LEAST = (8, 0)
"""Below this compute capability Triton multiplies without tensor cores."""
_MEMORY = {80: 160, 86: 96, 90: 224, 120: 96}
"""KiB of shared memory that a tile may take, by compute capability; others take the next lower one."""
_ROWS = 128
"""Rows of a weight that a program multiplies: two tensor core operands of an H100."""
_BLOCK = 1024
"""Sums that a program adds."""


@dataclass(frozen=True)
class Tile:
    """The tile of a program, and how it is multiplied."""

    tokens: int
    warps: int
    stages: int
    """Chunks that are loaded at the same time (pipeline stages)."""
    scaled: bool
    """Whether weights are scaled as halves before they are multiplied, not fp32 sums after."""


@lru_cache(maxsize=1024)
def tile(kind: Kind, whole: bool, tokens: int, capability: tuple[int, int]) -> Tile:
    """The tile for this many tokens per matrix, as registers of compiled code allow; `whole`: one scale for a row."""
    planes = ptx.planes(kind.bits)
    several = not whole and kind.planes < planes
    memory = _MEMORY[max(number for number in _MEMORY if number <= max(80, 10 * capability[0] + capability[1]))]

    def stages(wide: int) -> int:
        """How many chunks of weights and of tokens shared memory holds."""
        return min(4, memory * 1024 // (2 * (_ROWS * tiles.words(kind.bits) + wide * planes * tiles.WORDS)))

    wide = next((size for size in (16, 32, 64) if tokens <= size), 128)
    while stages(wide) < 2:
        wide //= 2
    table = kind.grid == "table"
    # Unscaled sums of several groups would not fit in registers.
    scaled = wide == 128 or kind.planes == 0
    scaled |= (wide == 64 and (several or table or kind.bits == 3)) or (wide == 32 and several and kind.bits < 4)
    crowded = table or kind.bits == 3 or capability < (9, 0) or (kind.scale == "f32" and not whole)
    warps = 8 if wide == 128 and crowded else 4
    return Tile(wide, warps, stages(wide), scaled and not whole and kind.scale != "f32")


@lru_cache(maxsize=1024)
def constants(kind: Kind, grid: str, whole: bool, tile: Tile, even: bool, split: bool, texts: bool = True) -> dict[str, Any]:
    """Compile-time arguments of `swap`. `grid` is the scheme's; `even`: chunks divide the columns."""
    # fp32 sums allow any unit of f16. So do scales in E4M3: their products with E2M1 are exact in f16, and in bf16 if
    # they are multiplied to lie above its smallest normal number.
    fine = kind.scale == "e4m3"
    normal, lift = not fine and (tile.scaled or kind.x == "bf16"), 2.0**117 if fine and kind.x == "bf16" else 1.0
    planes = range(ptx.planes(kind.bits))
    text = tuple(ptx.text(grid, kind.bits, p, kind.x, kind.zero, tile.scaled, normal) for p in planes)
    return {
        "ASM": text if texts else None,
        "OFFSET": tuple(ptx.offset(grid, kind.bits, p, kind.x) for p in planes),
        "UNIT": ptx.unit(grid, kind.x, normal), "LIFT": lift,
        "BITS": kind.bits, "FLOAT": ptx.FLOATS[grid] if kind.bits == 8 and grid in ptx.FLOATS else None,
        "TABLE": tuple(values(grid).tolist()) if kind.bits == 4 and grid != "int" else None,
        "FOLD": kind.planes, "SCALE": kind.scale, "WHOLE": whole, "PRE": tile.scaled, "EVEN": even, "SPLIT": split,
        "BM": tile.tokens, "BN": _ROWS,
    }  # fmt: skip


class Triton(Fused):
    """Runs every Kind."""

    name = "triton"

    def refuse(self, work: Work) -> None:
        if importlib.util.find_spec("triton") is None:
            raise Refusal("triton is not installed", "pip install triton")
        if not _interpreted():
            capability = device.usable(work.device)
            if capability < _LEAST:
                raise Refusal(f"Triton multiplies without tensor cores on compute capability {capability}", "use another backend")
        super().refuse(work)

    def product(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        return _multiply(x, packed, bias, None)

    def grouped(self, x: torch.Tensor, packed: Packed, offsets: torch.Tensor) -> torch.Tensor:
        # Outliers and low-rank factors belong to single matrices.
        if packed.state.outliers is not None or packed.state.lowrank is not None:
            return super().grouped(x, packed, offsets)
        return _multiply(x, packed, None, offsets)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _multiply(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, offsets: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] by the codes alone, or by the matrices of a stack if `offsets` give the rows of each: [M, N]."""
    from compress.kernels.native import swap

    parts, kind, grid, rows = packed.parts, kind_of(packed, x), packed.scheme.grid, packed.rows
    out = x.new_empty(len(x), rows)
    if not len(x):
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    emulated, at, whole = _interpreted(), device.number(x), packed.scheme.group is None
    capability, processors = (_LEAST, 2) if emulated else (device.capability(at), device.processors(at))
    tokens = len(x) if offsets is None else -(-len(x) // (len(offsets) - 1))
    chosen, chunks = tile(kind, whole, tokens, capability), parts["tiles"].shape[-3]
    blocks = None if offsets is None else block_map(offsets, len(x), chosen.tokens)
    high = -(-len(x) // chosen.tokens) if blocks is None else blocks.shape[1]
    wide = -(-rows // _ROWS)
    per = -(-chunks // splits(kind, chosen, high * wide, chunks, processors))
    count = -(-chunks // per)
    sums = out if count == 1 else out.new_empty(count, *out.shape, dtype=torch.float32)
    held, even = scales(packed), packed.columns % tiles.chunk(kind.bits) == 0
    compiled = constants(kind, grid, whole, chosen, even, count > 1, not emulated)
    with nullcontext() if emulated else torch.cuda.device(at):
        swap.swap[high, wide, count](
            x, parts["tiles"], held.view(torch.uint8) if kind.scale == "e4m3" else held, parts.get("zero"),
            None if bias is None else bias.contiguous(),
            parts.get("tensor_scale"), blocks, sums, *out.shape, packed.columns, x.stride(0), chunks, held.shape[-2],
            shift(packed), high, per, **compiled, num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
        if count > 1:
            swap.add[(-(-out.numel() // _BLOCK),)](sums, out, out.numel(), count, _BLOCK)
    return out


def splits(kind: Kind, tile: Tile, programs: int, chunks: int, processors: int) -> int:
    """Parts that columns are cut into, so that a GPU has two programs for each multiprocessor.

    Each has at least four chunks, and fp32 sums, which are written and read, stay below half the bytes of codes.
    """
    codes = chunks * 2 * tiles.words(kind.bits)
    return max(1, min(2 * processors // programs, chunks // 4, codes // (16 * tile.tokens)))
