"""Packed: packs and unpacks a weight in the native layout, whole or by rows.

Parts, by name: `tiles` and the grids `scale`, `zero` and `minimum` as in tiles.py; scales of a matrix or of blocks,
`tensor_scale`, outliers and low-rank factors as in QTensor. If there are `indices`, tiles hold the kept entries of a 2:4 weight,
codes or plain values, as in sparse.py. Codes are returned as QTensors, so that their values are defined in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import linear

from compress.kernels.native import sparse, tiles
from compress.numerics.lowrank import Factors
from compress.numerics.qtensor import PARTS as CANONICAL_PARTS
from compress.numerics.qtensor import QTensor, parts_beside, with_beside
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State

PARTS = ("tiles", "rest", "indices", *CANONICAL_PARTS)
"""Suffixes of a weight's name on disk."""
GRIDS = ("scale", "zero", "minimum")
"""Parts that are stored in tiles where each row has scales of its own."""


def groups_of(scheme: Scheme, columns: int, halved: bool = False) -> int:
    """Groups of the padded columns, because kernels read scales of whole chunks."""
    chunk = sparse.chunk(coded=True) if halved else tiles.chunk(scheme.bits)
    return scheme.groups(-(-columns // chunk) * chunk)


def by_row(scheme: Scheme) -> bool:
    """Whether each row has scales of its own, which are stored in tiles; scales of a matrix or of blocks are not."""
    return scheme.scales not in ("tensor", "block")


def pack(q: QTensor, halved: bool = False) -> dict[str, torch.Tensor]:
    """The parts of a QTensor, if `halved` without its zeros. Raises sparse.Crowded if it is not 2:4."""
    groups = groups_of(q.scheme, q.codes.shape[-1], halved)
    scale = tiles.pack_grid(q.scale, groups) if by_row(q.scheme) else q.scale
    zero, minimum = (None if part is None else tiles.pack_grid(part, groups) for part in (q.zero, q.minimum))
    codes = sparse.pack(q.codes, q.scheme.middle) if halved else {"tiles": tiles.pack(q.codes, q.scheme.bits)}
    parts = {**codes, "scale": scale, "zero": zero, **parts_beside(q), "minimum": minimum}
    return {name: part.contiguous() for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class Packed:
    """A weight [experts?, rows, columns] and its parts."""

    state: State
    rows: int
    columns: int
    parts: Mapping[str, torch.Tensor]
    made: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What backends have made of these parts, by their names."""

    @property
    def scheme(self) -> Scheme:
        assert self.state.scheme is not None
        return self.state.scheme

    @property
    def halved(self) -> bool:
        """Whether zeros of a 2:4 weight are left out."""
        return "indices" in self.parts

    def values(self, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """Dequantized values, of all or of some rows (see `take`), in fp32; in the stored dtype if not in codes."""
        if self.state.scheme is not None:
            return (self.unpack() if rows is None else self.take(rows)).dequantize()
        if rows is None:
            return sparse.unpack(self.parts, self.rows, self.columns, 0)
        return sparse.take(self.parts, rows, self.columns, 0)

    def whole(self) -> Packed:
        """The same weight with the left-out zeros put back."""
        if not self.halved:
            return self
        codes = sparse.unpack(self.parts, self.rows, self.columns, self.scheme.middle)
        scale = self.parts["scale"][..., : groups_of(self.scheme, self.columns), :].contiguous()
        parts = {name: part for name, part in self.parts.items() if name != "indices"}
        return replace(self, parts={**parts, "tiles": tiles.pack(codes, self.scheme.bits), "scale": scale})

    def unpack(self) -> QTensor:
        """The inverse of `pack`, bit for bit."""
        scheme, groups, zero = self.scheme, self.scheme.groups(self.columns), self.parts.get("zero")
        if self.halved:
            codes = sparse.unpack(self.parts, self.rows, self.columns, scheme.middle)
        else:
            codes = tiles.unpack(self.parts["tiles"], scheme.bits, self.rows, self.columns)
        scale = tiles.unpack_grid(self.parts["scale"], self.rows, groups) if by_row(scheme) else self.parts["scale"]
        zero = None if zero is None else tiles.unpack_grid(zero, self.rows, groups)
        parts = dict(self.parts)
        if "minimum" in parts:
            parts["minimum"] = tiles.unpack_grid(parts["minimum"], self.rows, groups)
        return with_beside(self.state, codes, scale, zero, parts)

    def by_factors(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, columns] by the low-rank factors alone: [tokens, rows], in x's dtype."""
        parts = self.parts
        left, right = Factors(parts["left"], parts["right"], parts.get("rank_scale")).halves()
        return linear(linear(x, right.to(x.dtype)), left.to(x.dtype))

    def unrotated(self) -> tuple[Packed, int]:
        """The same codes for inputs that come rotated, of which backends need not know; and the size of their blocks, or 0."""
        if self.state.scheme is None or not self.scheme.hadamard:
            return self, 0
        state = replace(self.state, scheme=replace(self.scheme, hadamard=0))
        return replace(self, state=state), self.scheme.hadamard

    def expert(self, index: int) -> Packed:
        """One matrix of fused experts."""
        return replace(self, parts={name: part[index] for name, part in self.parts.items()})

    def take(self, rows: slice | torch.Tensor) -> QTensor:
        """Some rows of a matrix as a QTensor with scales per row: a slice that begins at a tile, or an index int64 [n]."""
        index = torch.arange(rows.start, rows.stop, device=self.parts["tiles"].device) if isinstance(rows, slice) else rows
        scheme, groups, zero = self.scheme, self.scheme.groups(self.columns), self.parts.get("zero")
        if self.halved:
            codes = sparse.take(self.parts, rows, self.columns, scheme.middle)
        else:
            codes = tiles.split(tiles.by_rows(self.parts["tiles"], rows), scheme.bits).flatten(1)[:, : self.columns]
        if by_row(scheme):
            scale = tiles.by_rows(self.parts["scale"], rows)[:, :groups]
        else:
            scale = self.parts["scale"][index // scheme.rows_per_scale(self.rows)]
        zero = None if zero is None else tiles.by_rows(zero, rows)[:, :groups]
        parts = dict(self.parts)
        if "minimum" in parts:
            parts["minimum"] = tiles.by_rows(parts["minimum"], rows)[:, :groups]
        q = with_beside(self.state, codes, scale, zero, parts)
        return replace(
            q,
            scheme=scheme if by_row(scheme) else replace(scheme, scales="row"),
            outliers=None if q.outliers is None else q.outliers.take(index),
            kept=None if q.kept is None else q.kept.take(index),
            lowrank=None if q.lowrank is None else replace(q.lowrank, left=q.lowrank.left[index]),
        )
