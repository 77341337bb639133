"""Which kernel for how many tokens: numbers of a cost model; none has been timed.

The model counts bytes from memory, instructions for each weight, and products in each second. Up to `cuda` tokens the bandwidth
of memory bounds, and the CUDA kernel, which multiplies 8 at a time, keeps it busy; then products do, and those of Triton's
tiles are as fast as dense ones up to `triton` tokens; beyond, it pays to expand the weight first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from compress.kernels.cuda.cubins import Capability
from compress.kernels.native.kind import Kind

TOKENS = 8
"""Tokens of a tile of the CUDA kernel: what the second side of a tensor core's product has."""
_FEW = 64
"""Up to so many tokens the CUDA kernel stands in for Triton's."""


@dataclass(frozen=True)
class Row:
    """What is known of an architecture."""

    cuda: int
    triton: int
    warps: int
    """Of a processor, to have as many bytes on their way as its share of the memory's bandwidth takes in 0.7 us, a KiB each."""


_ROWS = {
    75: Row(cuda=31, triton=0, warps=5),
    80: Row(cuda=8, triton=400, warps=13),
    86: Row(cuda=8, triton=400, warps=8),
    89: Row(cuda=8, triton=400, warps=6),
    90: Row(cuda=8, triton=1700, warps=18),
}
"""By compute capability; what is between or beyond has the row below it."""


@lru_cache(maxsize=16)
def row(capability: Capability) -> Row:
    """Of a GPU of 7.5 or more."""
    return _ROWS[max(number for number in _ROWS if number <= capability.number)]


def order(capability: Capability, kind: Kind, tokens: int) -> tuple[str, ...]:
    """Backends for so many tokens, the fastest first."""
    limits = row(capability)
    # Values that are looked up cost Triton more, so that the CUDA kernel has what it does in one go.
    if tokens <= max(limits.cuda, TOKENS * counts(kind)[-1] if kind.grid == "table" else 0):
        return "cuda", "triton", "cublas"
    if tokens <= limits.triton:
        return ("triton", "cuda", "cublas") if tokens <= _FEW else ("triton", "cublas", "cuda")
    return "cublas", "triton", "cuda"


def counts(kind: Kind) -> tuple[int, ...]:
    """How many tiles of tokens a block of the CUDA kernel may multiply: four only where codes leave registers for them."""
    return (1, 2, 4) if (kind.grid, kind.bits) == ("int", 4) else (1, 2)


def tiles(kind: Kind, tokens: int) -> int:
    """How many a block multiplies."""
    return next((count for count in counts(kind) if tokens <= count * TOKENS), counts(kind)[-1])


def warps(count: int) -> int:
    """Of a block with so many tiles of tokens, all on the same 16 rows."""
    return 4 if count == 4 else 8


def splits(capability: Capability, processors: int, blocks: int, warps: int, chunks: int) -> int:
    """Parts that the columns are cut into, so that `blocks` of `warps` keep a GPU busy: each warp has two chunks or more."""
    wanted = -(-row(capability).warps * processors // (blocks * warps))
    return max(1, min(wanted, chunks // (2 * warps), 8))
