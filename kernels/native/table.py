"""Table: the kernel for each number of tokens, by a cost model; none was timed.

The model counts bytes from memory, instructions per weight, and products per second. Up to `cuda` tokens the memory's bandwidth
is the limit, which the CUDA kernel, with 8 tokens at a time, reaches. Beyond, products are the limit; those of Triton's tiles
are as fast as dense ones up to `triton` tokens. For more tokens it pays to expand the weight first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from compress.kernels.cuda.cubins import Capability
from compress.kernels.native.kind import Kind

TOKENS = 8
"""Tokens of a tile of the CUDA kernel: the second dimension of a tensor core's product."""
_FEW = 64
"""Up to this many tokens the CUDA kernel replaces Triton's if that is missing."""


@dataclass(frozen=True)
class Row:
    """The parameters of an architecture."""

    cuda: int
    triton: int
    warps: int
    """Warps per multiprocessor: each has a KiB in flight, and together they cover its share of the bandwidth times 0.7 us."""


_ROWS = {
    75: Row(cuda=31, triton=0, warps=5),
    80: Row(cuda=8, triton=400, warps=13),
    86: Row(cuda=8, triton=400, warps=8),
    89: Row(cuda=8, triton=400, warps=6),
    90: Row(cuda=8, triton=1700, warps=18),
}
"""Rows by compute capability; others take the next lower one."""


@lru_cache(maxsize=16)
def row(capability: Capability) -> Row:
    """The row for a GPU of 7.5 or more."""
    return _ROWS[max(number for number in _ROWS if number <= capability.number)]


def order(capability: Capability, kind: Kind, tokens: int) -> tuple[str, ...]:
    """Backends for this many tokens, the fastest first."""
    limits = row(capability)
    # Lookups cost Triton more, so the CUDA kernel is preferred for as many tokens as it multiplies at once.
    if tokens <= max(limits.cuda, TOKENS * counts(kind)[-1] if kind.grid == "table" else 0):
        return "cuda", "triton", "cublas"
    if tokens <= limits.triton:
        return ("triton", "cuda", "cublas") if tokens <= _FEW else ("triton", "cublas", "cuda")
    return "cublas", "triton", "cuda"


def counts(kind: Kind) -> tuple[int, ...]:
    """Numbers of tiles of tokens that a block of the CUDA kernel may multiply: four only if codes leave enough registers."""
    return (1, 2, 4) if (kind.grid, kind.bits) == ("int", 4) else (1, 2)


def tiles(kind: Kind, tokens: int) -> int:
    """The number of tiles of tokens that a block multiplies."""
    return next((count for count in counts(kind) if tokens <= count * TOKENS), counts(kind)[-1])


def warps(count: int) -> int:
    """Warps of a block with `count` tiles of tokens; all work on the same 16 rows."""
    return 4 if count == 4 else 8


def splits(capability: Capability, processors: int, blocks: int, warps: int, chunks: int) -> int:
    """Parts that columns are cut into, so that `blocks` of `warps` occupy a GPU; each warp has at least two chunks."""
    wanted = -(-row(capability).warps * processors // (blocks * warps))
    return max(1, min(wanted, chunks // (2 * warps), 8))
