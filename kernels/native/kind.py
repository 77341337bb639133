"""Kind: the properties of a packed weight that a fused kernel is compiled for.

Everything else (rows, columns, chunks, tokens) is an argument of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from compress.errors import Refusal
from compress.kernels.dispatch import Work
from compress.kernels.native import tiles

HALVES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_SCALES = {**HALVES, torch.float32: "f32", torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}
TABLES = {"nf": 4, "e3m0": 4, "iq4": 4}
"""Grids that kernels look up in a table -> the number of bits that this supports."""
WHOLE = 31
"""The shift for a group that is a whole row: larger than any column's number."""


@dataclass(frozen=True)
class Kind:
    """One variant of a kernel."""

    grid: str
    """int, e2m1, e4m3, e5m2, or table: any 16 values."""
    bits: int
    zero: bool
    """Whether there are zero points."""
    planes: int
    """Planes of 32 columns that share a scale within a chunk; 0 if half a plane does."""
    scale: str
    """Dtype of stored scales: f16, bf16, f32, e8m0 (the byte of a power of two) or e4m3."""
    x: str
    """Dtype of activations and outputs: f16 or bf16."""

    @classmethod
    def of(cls, work: Work) -> Kind:
        """The Kind of a weight and its use. Raises Refusal if fused kernels cannot run it."""
        scheme = work.state.scheme
        if scheme is None:
            raise Refusal("it is not in codes", "use another backend")
        if work.dtype not in HALVES:
            raise Refusal(f"activations are {str(work.dtype)[6:]}, not half precision", "load the model in bfloat16 or float16")
        if work.turned:
            raise Refusal("a Conv1D adds over its rows", "leave the backend to be chosen")
        if scheme.grid in TABLES and scheme.bits != TABLES[scheme.grid]:
            raise Refusal(f"{scheme} is a table of {scheme.levels} values, not of 16", "use another backend")
        if scheme.bits in (5, 6):
            raise Refusal(f"no fused kernel reads codes of {scheme.bits} bits", "use cpu or reference, which expand codes")
        if scheme.minimum:
            raise Refusal(f"fused kernels add zero points, and {scheme} has minima", "use cpu or reference, which expand codes")
        group, chunk = scheme.group or tiles.chunk(scheme.bits), tiles.chunk(scheme.bits)
        if group < 16 or group & (group - 1):
            raise Refusal(f"groups of {group} columns do not end where a product of 16 does", "use another backend")
        grid = "table" if scheme.grid in TABLES else scheme.grid
        planes = min(group, chunk) // tiles.WORDS
        return cls(grid, scheme.bits, not scheme.symmetric, planes, _SCALES[work.scales], HALVES[work.dtype])

    def __str__(self) -> str:
        zero = "z" if self.zero else ""
        return f"{self.grid}{self.bits}{zero}-p{self.planes}-{self.scale}-{self.x}"

    @property
    def defines(self) -> tuple[str, ...]:
        """Options that compile a CUDA source for it."""
        values = {
            "GRID": f"GRID_{self.grid.upper()}", "BITS": self.bits, "ZERO": int(self.zero), "FOLD": self.planes,
            "SCALE": f"SCALE_{self.scale.upper()}", "BF16": int(self.x == "bf16"),
        }  # fmt: skip
        return tuple(f"-D{name}={value}" for name, value in values.items())


def group_shift(group: int | None) -> int:
    """log2 of a group size, WHOLE for a row."""
    return WHOLE if group is None else group.bit_length() - 1


@lru_cache(maxsize=16)
def table(grid: str) -> torch.Tensor:
    """The 16 values of nf4 or e3m0 by code, fp32."""
    from compress.numerics.floats import decode
    from compress.spec.scheme import Scheme

    return decode(torch.arange(16, dtype=torch.uint8), Scheme(4, grid=grid))
