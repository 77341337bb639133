"""GGUF types: the tensor types of GGUF files, and the sizes of their blocks."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 32
"""Weights of a block in all types that codes are kept in."""


@dataclass(frozen=True)
class GgufType:
    """One type of a tensor: `weights` values of a row lie together in a block of `nbytes` bytes."""

    name: str
    number: int
    weights: int
    nbytes: int
    dtype: str = "U8"
    """Its safetensors dtype; blocks count as bytes."""


_PLAIN = (
    ("F32", 0, 4), ("F16", 1, 2), ("I8", 24, 1), ("I16", 25, 2), ("I32", 26, 4), ("I64", 27, 8), ("F64", 28, 8), ("BF16", 30, 2),
)  # fmt: skip
_BLOCKS = (
    ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210),
    ("Q8_K", 15, 256, 292), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
)  # fmt: skip
TYPES = {
    **{name: GgufType(name, number, 1, nbytes, name) for name, number, nbytes in _PLAIN},
    **{name: GgufType(name, number, weights, nbytes) for name, number, weights, nbytes in _BLOCKS},
}
BY_NUMBER = {found.number: found for found in TYPES.values()}
