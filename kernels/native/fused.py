"""Fused backends: base of backends that multiply by packed tiles directly.

Their kernels read one grid of scales [T, groups, 16] for every scheme, so scales of a matrix or of blocks are expanded when
a weight is prepared (`grid`, 4 bytes for 128 weights). Outliers are stored as their difference from the codes' values; they and
low-rank factors are small products of their own, added to the result of the fused kernel.
"""

from __future__ import annotations

import torch

from compress.kernels.dispatch import Backend, Work
from compress.kernels.native import tiles
from compress.kernels.native.kind import Kind, group_shift
from compress.kernels.native.packed import Packed, by_row, groups_of


class Fused(Backend):
    """A backend whose kernels take a Kind."""

    def refuse(self, work: Work) -> None:
        Kind.of(work)

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        # No fused kernel reads the halved form of 2:4 weights.
        packed = packed.whole()
        parts, scheme = dict(packed.parts), packed.scheme
        if not by_row(scheme):
            rows = torch.arange(packed.rows, device=parts["scale"].device) // scheme.rows_per_scale(packed.rows)
            parts["grid"] = tiles.pack_grid(parts["scale"][rows], groups_of(scheme, packed.columns))
        if packed.state.outliers is not None:
            parts["outlier_deltas"] = deltas(packed)
        return parts

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        out = self.product(x, packed, bias)
        if packed.state.outliers is not None:
            self.add_outliers(out, x, packed)
        if packed.state.lowrank is not None:
            out += packed.by_factors(x)
        return out

    def product(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        """x [tokens, inputs] by the codes alone, plus the bias: [tokens, outputs] in x's dtype."""
        raise TypeError(f"{self.name} does not multiply")

    def add_outliers(self, out: torch.Tensor, x: torch.Tensor, packed: Packed) -> None:
        """Adds to `out` [tokens, outputs] the contribution of outliers beyond the codes in their places."""
        parts = packed.parts
        sparse = torch.sparse_csr_tensor(
            parts["outlier_offsets"], parts["outlier_columns"].int(), parts["outlier_deltas"], (packed.rows, packed.columns)
        )
        out += (sparse @ x.T.float()).T.to(out.dtype)


def work_of(packed: Packed, dtype: torch.dtype) -> Work:
    """The Work of a prepared weight, or of a stack, for activations of that dtype."""
    held = scales(packed)
    return Work(packed.state, packed.rows, packed.columns, dtype, held.dtype, held.device.type)


def kind_of(packed: Packed, x: torch.Tensor) -> Kind:
    """The Kind of a prepared weight and its activations."""
    return Kind.of(work_of(packed, x.dtype))


def scales(packed: Packed) -> torch.Tensor:
    """The grid of scales of a prepared weight, [experts?, T, groups, 16]."""
    return packed.parts["grid" if "grid" in packed.parts else "scale"]


def shift(packed: Packed) -> int:
    """The right shift that turns the number of a column into that of its group."""
    return group_shift(packed.scheme.group)


def deltas(packed: Packed) -> torch.Tensor:
    """Outliers [experts?, n] less the values of the codes in their places, fp32."""
    matrices = [packed] if packed.parts["tiles"].dim() == 4 else [packed.expert(e) for e in range(len(packed.parts["tiles"]))]
    found = []
    for matrix in matrices:
        rows = [slice(start, min(matrix.rows, start + 1024)) for start in range(0, matrix.rows, 1024)]
        found.append(torch.cat([_deltas(matrix, part) for part in rows]))
    return torch.stack(found).view(packed.parts["outlier_values"].shape)


def _deltas(matrix: Packed, rows: slice) -> torch.Tensor:
    q = matrix.take(rows)
    assert q.outliers is not None
    return q.outliers.values.float() - q.values()[q.outliers.places()]
