"""Codes in int32 words, groups out of order, and their dequantized weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.importers.packed import Stored, steps
from compress.numerics import bitstream
from compress.spec.scheme import BITS, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST_GROUP = 8
"""The smallest group that a scheme may have."""
CONV1D = "a Conv1D's groups run along its inputs, its scheme's along the outputs, so it is dense"
TINY_GROUP = "no scheme has groups as small, so it is dense"


def along_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 words [rows, words], a bit stream per row -> uint8 codes [rows, columns]."""
    codes = torch.empty(words.shape[0], columns, dtype=torch.uint8)
    for rows in steps(words.shape[0], columns):
        # Cloned: a dimension of one counts as contiguous whatever its stride, which may prevent the view as bytes.
        stream = words[rows].clone(memory_format=torch.contiguous_format).view(torch.uint8)
        codes[rows] = bitstream.unpack(stream, bits, columns)
    return codes


def down_rows(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """int32 words [words, columns], a bit stream down each column -> uint8 codes, transposed [columns, rows]."""
    return along_rows(words.T, bits, rows)


def scheme_for(bits: int, group: int | None, symmetric: bool) -> Scheme | None:
    """The integer scheme with these properties, None if there is none."""
    if bits not in BITS or (group is not None and group < LEAST_GROUP):
        return None
    return Scheme(bits, group, symmetric)


@dataclass(frozen=True)
class Order:
    """The group of each input."""

    runs: tuple[int, ...] | None = None
    """The group of each run of inputs; None if groups are in order."""
    scattered: bool = False
    """Whether a run has inputs of several groups, so that g_idx is needed as a whole."""


IN_ORDER = Order()


def order_of(stored: Stored, name: str, index: torch.Tensor, group: int, groups: int) -> Order:
    """The order in a g_idx. Raises InputError for the number of a group that does not exist."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise stored.bad(name, f"groups from 0 to {groups - 1}", f"{low} to {high}")
    first = index[::group]
    if not torch.equal(first.repeat_interleave(group)[: len(index)], index):
        return Order(scattered=True)
    runs = tuple(first.tolist())
    return IN_ORDER if runs == tuple(range(groups)) else Order(runs)


def expand(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int, index: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`scale * (code - zero)`, [rows, columns], from codes of that shape and scales [rows, groups].

    `index` int64 [columns] is the group of each column. The difference is exact in every dtype of scales, and fp32
    holds its product with a 16-bit scale, so one rounding to the scales' dtype equals the multiplication in that
    dtype which readers do.
    """

    def piece(rows: slice) -> torch.Tensor:
        z = zero if isinstance(zero, int) else zero[rows].float()[:, index]
        return ((codes[rows].float() - z) * scale[rows].float()[:, index]).to(scale.dtype)

    return by_rows(tuple(codes.shape), dtype, piece)


def by_rows(
    shape: tuple[int, ...], dtype: torch.dtype, piece: Callable[[slice], torch.Tensor], multiple: int = 1
) -> torch.Tensor:
    """A matrix [rows, columns] computed some rows at a time, to keep temporaries small."""
    out = torch.empty(shape, dtype=dtype)
    for rows in steps(shape[0], shape[1], multiple):
        out[rows] = piece(rows).to(dtype)
    return out
