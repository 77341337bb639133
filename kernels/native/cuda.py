"""cuda backend: our kernels in CUDA C++, for few tokens and for expanding.

Legend: M tokens, N rows, K columns; T = ceil(N / 16) tiles of rows, C chunks of columns.

Every block multiplies 16 rows by 8, 16 or 32 tokens, its warps taking turns over chunks. If there are fewer blocks than the
GPU can run, columns are cut into parts, whose fp32 sums a second kernel adds in order. There are no atomics, so results are
reproducible; nothing waits for the GPU, so it can be captured in a CUDA graph after a first run.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from compress.errors import Refusal
from compress.kernels.cuda import cubins, device
from compress.kernels.cuda.variant import Variant
from compress.kernels.dispatch import Work
from compress.kernels.native import table, tiles
from compress.kernels.native.fused import Fused, kind_of, scales, shift
from compress.kernels.native.kind import HALVES, TABLES, Kind
from compress.kernels.native.kind import table as values
from compress.kernels.native.packed import Packed
from compress.spec.corrections import SHORT

_MOST_BLOCKS = (1 << 16) - 1
"""Largest second and third dimension of a grid."""
_THREADS = 256


@lru_cache(maxsize=256)
def skinny(kind: Kind, count: int) -> Variant:
    """The kernel for products, with `count` tiles of tokens per block."""
    return Variant("skinny", f"{kind}-n{count}", (*kind.defines, f"-DNT={count}", f"-DWARPS={table.warps(count)}"))


@lru_cache(maxsize=256)
def expand(kind: Kind) -> Variant:
    """The kernel that dequantizes a weight."""
    return Variant("expand", str(kind), kind.defines)


@lru_cache(maxsize=256)
def finish(x: torch.dtype) -> Variant:
    """The kernel that adds sums over parts of columns."""
    return Variant("finish", HALVES[x], (f"-DBF16={int(x == torch.bfloat16)}",))


@lru_cache(maxsize=256)
def outliers(x: torch.dtype, wide: bool) -> Variant:
    """The kernel that adds outliers; with `wide` their columns are int32."""
    name = f"{HALVES[x]}{'-wide' if wide else ''}"
    return Variant("outliers", name, (f"-DBF16={int(x == torch.bfloat16)}", f"-DWIDE={int(wide)}"))


class Cuda(Fused):
    """Runs every Kind."""

    name = "cuda"

    def refuse(self, work: Work) -> None:
        capability = device.usable(work.device)
        super().refuse(work)
        if capability < (7, 5):
            raise Refusal(f"the GPU has compute capability {capability}, and kernels need 7.5", "use another backend")
        if capability < (8, 0) and work.dtype == torch.bfloat16:
            raise Refusal(f"a GPU of compute capability {capability} does not multiply in bfloat16", "load the model in float16")
        for variant in self.variants(work):
            cubins.origin(variant, capability)

    def variants(self, work: Work) -> list[Variant]:
        """The kernels that it may run."""
        kind = Kind.of(work)
        return [*(skinny(kind, count) for count in table.counts(kind)), finish(work.dtype), *dense_variants(work)]

    def product(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        out = x.new_empty(len(x), packed.rows)
        step = _MOST_BLOCKS * table.TOKENS
        for start in range(0, len(x), step):
            _multiply(x[start : start + step], packed, bias, out[start : start + step], None)
        return out

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        parts = super().prepare(packed)
        if packed.scheme.grid in TABLES:
            parts["table"] = values(packed.scheme.grid).to(parts["tiles"].device)
        return parts

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in HALVES or packed.state.outliers is not None or packed.state.lowrank is not None:
            return super().rows(packed, rows, dtype)
        return expanded(packed, rows, dtype)

    def add_outliers(self, out: torch.Tensor, x: torch.Tensor, packed: Packed) -> None:
        parts, x = packed.parts, _aligned(x)
        columns = parts["outlier_columns"]
        variant = outliers(x.dtype, columns.dtype == torch.int32)
        tensors = (x, parts["outlier_deltas"], columns, parts["outlier_offsets"], out)
        grid = (-(-packed.rows // 8), min(-(-len(x) // 8), _MOST_BLOCKS), 1)
        device.run(variant, grid, _THREADS, tensors, len(x), packed.rows, x.stride(0))

    def grouped(self, x: torch.Tensor, packed: Packed, offsets: torch.Tensor) -> torch.Tensor:
        # Outliers and low-rank factors belong to single matrices.
        if packed.state.outliers is not None or packed.state.lowrank is not None or len(x) > _MOST_BLOCKS:
            return super().grouped(x, packed, offsets)
        out = x.new_empty(len(x), packed.rows)
        if len(x):
            _multiply(x, packed, None, out, offsets)
        return out


def dense_variants(work: Work) -> list[Variant]:
    """The kernels that expand a weight and add its outliers."""
    return [expand(Kind.of(work)), *([outliers(work.dtype, work.columns > SHORT)] if work.state.outliers is not None else [])]


def expanded(packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows [n, K] of dequantized codes, rounded once; the slice begins at a tile."""
    parts, held = packed.parts, slice(rows.start // tiles.ROWS, -(-rows.stop // tiles.ROWS))
    out = parts["tiles"].new_empty(rows.stop - rows.start, packed.columns, dtype=dtype)
    codes, grid, zero = parts["tiles"][held], scales(packed)[held], parts.get("zero")
    tensors = (codes, grid, None if zero is None else zero[held], parts.get("table"), parts.get("tensor_scale"), out)
    integers = (*out.shape, codes.shape[1], grid.shape[1], shift(packed))
    device.run(expand(kind_of(packed, out)), (len(codes), -(-codes.shape[1] // 4), 1), 128, tensors, *integers)
    return out


def _multiply(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, out: torch.Tensor, offsets: torch.Tensor | None
) -> None:
    """x by the codes alone, into out [M, N]; by a stack of matrices if `offsets` give the rows of each."""
    parts, kind, x, (many, rows) = packed.parts, kind_of(packed, x), _aligned(x), out.shape
    held, chunks = parts["tiles"].shape[-4:-2]
    if offsets is None:
        blocks, count = None, table.tiles(kind, many)
        high = -(-many // (table.TOKENS * count))
    else:
        from compress.kernels.native.blocks import block_map

        count = table.tiles(kind, -(-many // (len(offsets) - 1)))
        blocks = block_map(offsets, many, table.TOKENS * count)
        high = blocks.shape[1]
    at, warps, mapped = device.number(x), table.warps(count), 0 if blocks is None else high
    splits = table.splits(device.capability(at), device.processors(at), held * high, warps, chunks)
    sums = out if splits == 1 else out.new_empty(splits, many, rows, dtype=torch.float32)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    tensors = (
        x, parts["tiles"], scales(packed), parts.get("zero"), parts.get("table"), bias, parts.get("tensor_scale"), blocks, sums,
    )  # fmt: skip
    integers = (many, rows, packed.columns, x.stride(0), chunks, scales(packed).shape[-2], shift(packed), mapped)
    device.run(skinny(kind, count), (held, splits, high), 32 * warps, tensors, *integers)
    if splits > 1:
        grid = (-(-rows // _THREADS), mapped or min(many, _MOST_BLOCKS), 1)
        added = (sums, bias, parts.get("tensor_scale"), blocks, out)
        device.run(finish(x.dtype), grid, _THREADS, added, many, rows, splits, mapped)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] in the form that kernels read: 8 columns at a time, padded with zeros."""
    if x.stride(1) == 1 and not x.shape[1] % 8 and not x.stride(0) % 8 and not x.data_ptr() % 16:
        return x
    whole = x.new_zeros(len(x), -(-x.shape[1] // 8) * 8)
    whole[:, : x.shape[1]] = x
    return whole
