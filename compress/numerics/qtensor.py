"""QTensor: the one canonical quantized form, in memory and on disk.

`codes` uint8 [experts?, rows, columns] in 0 .. levels - 1: unsigned integers, indices into a table, or the bytes of
FP8. `scale` [experts?, rows, groups] in the dense weight's dtype, `zero` uint8 [experts?, rows, groups] (None when
symmetric: the zero of integers is then the middle code) or, for schemes with minima, `minimum` in the shape and dtype of
`scale`: values are scale * (code - zero), or scale * code + minimum, in fp32. Scales of floats have other shapes and dtypes
too: FP8 fp32, [experts?, 1, 1] for a matrix or one for each block; mxfp4 the bytes of E8M0; nvfp4 E4M3, to be divided by
`tensor_scale`, fp32 [] or [experts] (compressed-tensors' weight_global_scale; its reciprocal would not be exact); K-quants int8,
`minimum` too, to be multiplied by `super_scale` and, negated, `super_minimum`, fp16 [experts?, rows, columns / 256].
Where inputs are rounded as in nvfp4, `input_scale` fp32 [] divides their scales (compressed-tensors' input_global_scale); None
stands for 1.
Rows are outputs and columns inputs, also for fused experts stored [in, out]: y = x @ dequantize(q).T + b. Only a
Conv1D keeps its stored [in, out], y = x @ dequantize(q) + b, because its readers group it that way.

A weight may have three corrections. Outliers replace the values of some codes: values in the weight's dtype, by
rows. Kept columns replace all of a column's; their inputs are not rounded with the others. Then the product of low-rank factors
is added: bf16, or int8 with an fp32 scale for each rank.

On disk a weight `NAME` becomes `NAME.codes` (uint8 bit stream per row), `NAME.scale`, `NAME.zero`, `NAME.minimum` (the first
and the last of K-quants bit streams too, of what signed numbers are above the least), `NAME.tensor_scale`, `NAME.super_scale`,
`NAME.super_minimum`, `NAME.input_scale`, and with corrections `NAME.outlier_values` [experts?, n],
`.outlier_columns` uint16, or int32 beyond 65536 columns, `.outlier_offsets` int32 [experts?, rows + 1]; `NAME.kept_columns` int32
[k], `.kept_values` [rows, k], and if these are int8 `.kept_scale` [rows, 1]; `NAME.left` [experts?, rows, rank], `.right`
[experts?, rank, columns], and `.rank_scale` [experts?, rank].
`dequantize` defines its values; every quantizer returns a QTensor, every packer takes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compress.spec.corrections import SHORT
from compress.spec.scheme import FP8, SUPER
from compress.spec.weight_state import State, TensorSpec, Weight, payload_bytes

if TYPE_CHECKING:
    import torch

    from compress.numerics.columns import KeptColumns
    from compress.numerics.lowrank import Factors
    from compress.numerics.outliers import Sparse
    from compress.spec.scheme import Scheme


_CODES = ("codes", "scale", "zero", "minimum", "tensor_scale", "super_scale", "super_minimum", "input_scale")
_OUTLIERS = {"outlier_values": "values", "outlier_columns": "columns", "outlier_offsets": "offsets"}
_COLUMNS = {"kept_columns": "columns", "kept_values": "values", "kept_scale": "scale"}
_LOWRANK = {"left": "left", "right": "right", "rank_scale": "scale"}
"""Parts on disk -> fields of Sparse, KeptColumns and Factors."""
PARTS = (*_CODES, *_OUTLIERS, *_COLUMNS, *_LOWRANK)
"""Suffixes of a weight's name on disk."""


@dataclass(frozen=True)
class QTensor:
    """Codes with their scales and corrections; see the module's docstring for shapes."""

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None
    outliers: Sparse | None = None
    lowrank: Factors | None = None
    minimum: torch.Tensor | None = None
    super_scale: torch.Tensor | None = None
    super_minimum: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    kept: KeptColumns | None = None

    def steps(self) -> torch.Tensor:
        """The values of the scales, fp32 in the shape of `scale`."""
        from compress.numerics.scales import steps

        if self.super_scale is not None:
            return self._upper(self.super_scale) * self.scale.float()
        return steps(self.scale, self.tensor_scale)

    def lows(self) -> torch.Tensor | None:
        """The values of the minima, fp32 in the shape of `scale`; None if there are none."""
        if self.minimum is None or self.super_minimum is None:
            return None if self.minimum is None else self.minimum.float()
        return -(self._upper(self.super_minimum) * self.minimum.float())

    def _upper(self, supers: torch.Tensor) -> torch.Tensor:
        """What belongs to 256 columns, in the shape of `scale`."""
        return supers.float().repeat_interleave(self.scale.shape[-1] // supers.shape[-1], dim=-1)

    def plain(self) -> QTensor:
        """The same weight with plain fp32 scales, and minima if it has some."""
        if self.super_scale is None:
            return replace(self, scale=self.steps(), tensor_scale=None)
        return replace(self, scale=self.steps(), minimum=self.lows(), super_scale=None, super_minimum=None)

    def nonzero(self) -> torch.Tensor:
        """Which entries are not zero, bool [experts?, rows, columns]; with low-rank factors all may be."""
        found = self._coded()
        if self.outliers is not None:
            found = self.outliers.put(found)
        if self.kept is not None:
            found = self.kept.put(found)
        return found if self.lowrank is None else found.fill_(True)

    def _coded(self) -> torch.Tensor:
        """Which codes have a value other than zero."""
        if not self.scheme.whole:
            from compress.numerics.floats import decode

            return decode(self.codes, self.scheme) != 0
        if self.minimum is not None:
            return self.values() != 0
        if self.zero is None:
            return self.codes != self.scheme.middle
        group = self.scheme.group or self.codes.shape[-1]
        spread = self.zero.repeat_interleave(group, dim=-1)[..., : self.codes.shape[-1]]
        return self.codes != spread

    def dequantize(self) -> torch.Tensor:
        """fp32 weights [experts?, rows, columns]."""
        dense = self.base()
        return dense if self.lowrank is None else dense.add_(self.lowrank.product())

    def base(self) -> torch.Tensor:
        """The fp32 weights without low-rank factors."""
        dense = self.values()
        if self.scheme.hadamard:
            from compress.numerics.input_rotation import rotated

            dense = rotated(dense, self.scheme.hadamard)
        dense = dense if self.outliers is None else self.outliers.put(dense)
        return dense if self.kept is None else self.kept.put(dense)

    def values(self) -> torch.Tensor:
        """The fp32 values of the codes alone; of W R where inputs are rotated by R (numerics/input_rotation.py)."""
        if self.scheme.whole:
            from compress.numerics.grid import dequantize

            scale = self.scale if self.super_scale is None else self.steps()
            return dequantize(self.codes, scale, self.zero if self.minimum is None else self.lows(), self.scheme)
        from compress.numerics.floats import decode
        from compress.numerics.scales import spread

        return decode(self.codes, self.scheme).mul_(spread(self.steps(), self.scheme, *self.codes.shape[-2:]))


def integers(scheme: Scheme, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> QTensor:
    """A QTensor of integers whose zero points, or minima where the scheme has those, are `zero`."""
    return QTensor(scheme, codes, scale, minimum=zero) if scheme.minimum else QTensor(scheme, codes, scale, zero)


def as_matrix(weight: Weight, stored: torch.Tensor) -> torch.Tensor:
    """A stored tensor seen as [experts?, rows, columns]; the function is its own inverse."""
    return stored.transpose(-1, -2) if weight.transposed and weight.experts is not None else stored


def along_inputs(weight: Weight, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [experts?, rows, columns] with its inputs last; its own inverse. It transposes only a Conv1D."""
    return matrix.transpose(-1, -2) if weight.transposed and weight.experts is None else matrix


def part_specs(weight: Weight, state: State) -> dict[str, tuple[str, tuple[int, ...]]]:
    """safetensors dtype and shape of codes (as a byte stream), scale, and all other parts that the state has."""
    scheme = state.scheme
    assert scheme is not None
    stream_bytes = math.ceil(weight.columns * scheme.bits / 32) * 4
    lead = () if weight.experts is None else (weight.experts,)
    scales = (*lead, *scheme.grid_shape(weight.rows, weight.columns))
    stored = {"e8m0": "U8", "e4m3": "F8_E4M3", "k": "U8"}.get(scheme.scales, "F32" if scheme.grid in FP8 else weight.dtype)
    if scheme.scales == "k":
        scales = (*scales[:-1], math.ceil(scales[-1] * scheme.scale_bits / 32) * 4)
    found = {"codes": ("U8", (*lead, weight.rows, stream_bytes)), "scale": (stored, scales)}
    if scheme.zeros:
        found["zero"] = ("U8", scales)
    if scheme.minimum:
        found["minimum"] = (stored, scales)
    if scheme.scales == "k":
        supers = ("F16", (*lead, weight.rows, weight.columns // SUPER))
        found |= dict.fromkeys(("super_scale", "super_minimum")[: 1 + scheme.minimum], supers)
    if scheme.scales == "e4m3":
        found["tensor_scale"] = ("F32", lead)
    if scheme.input_divisor:
        found["input_scale"] = ("F32", ())
    if state.outliers is not None:
        entries = (*lead, state.outliers.count(weight.rows, weight.columns))
        found["outlier_values"] = (weight.dtype, entries)
        found["outlier_columns"] = ("U16" if weight.columns <= SHORT else "I32", entries)
        found["outlier_offsets"] = ("I32", (*lead, weight.rows + 1))
    if state.columns is not None:
        kept, kind = state.columns.count, "I8" if state.columns.int8 else weight.dtype
        found |= {"kept_columns": ("I32", (kept,)), "kept_values": (kind, (weight.rows, kept))}
        if state.columns.int8:
            found["kept_scale"] = (weight.dtype, (weight.rows, 1))
    if state.lowrank is not None:
        kind = "I8" if state.lowrank.int8 else "BF16"
        found["left"] = (kind, (*lead, weight.rows, state.lowrank.rank))
        found["right"] = (kind, (*lead, state.lowrank.rank, weight.columns))
        if state.lowrank.int8:
            found["rank_scale"] = ("F32", (*lead, state.lowrank.rank))
    return found


def specs(weight: Weight, state: State) -> list[TensorSpec]:
    """The tensors that hold `weight` in a canonical checkpoint."""
    if state.scheme is None:
        return [TensorSpec(weight.name, weight.dtype, weight.shape)]
    parts = _parts_of(weight.dtype, weight.shape, weight.transposed, state)
    return [TensorSpec(f"{weight.name}.{part}", *spec) for part, spec in parts]


def stored_bytes(weight: Weight, state: State) -> int:
    """Payload bytes of the tensors that hold `weight` in a canonical checkpoint."""
    return weight.nbytes if state.scheme is None else _bytes_of(weight.dtype, weight.shape, weight.transposed, state)


@lru_cache(maxsize=1024)
def _bytes_of(dtype: str, shape: tuple[int, ...], transposed: bool, state: State) -> int:
    return payload_bytes(specs(Weight("", dtype, shape, transposed=transposed), state))


@lru_cache(maxsize=1024)
def _parts_of(
    dtype: str, shape: tuple[int, ...], transposed: bool, state: State
) -> tuple[tuple[str, tuple[str, tuple[int, ...]]], ...]:
    """`part_specs` of the many weights that are alike but for their names."""
    return tuple(part_specs(Weight("", dtype, shape, transposed=transposed), state).items())


def encode(weight: Weight, q: QTensor) -> dict[str, torch.Tensor]:
    """Canonical tensors by name on disk, in the order of `specs`."""
    import torch

    from compress.numerics import bitstream

    parts = {"codes": bitstream.pack(q.codes, q.scheme.bits), "scale": q.scale, "zero": q.zero, **parts_beside(q)}
    if (bits := q.scheme.scale_bits) > 0:
        least = -(1 << (bits - 1)) if q.scheme.symmetric else 0
        for name in ("scale", "minimum"):
            if (part := parts[name]) is not None:
                parts[name] = bitstream.pack((part.to(torch.int16) - least).to(torch.uint8), bits)
    return {f"{weight.name}.{part}": tensor.contiguous() for part, tensor in parts.items() if tensor is not None}


def stored(weight: Weight, value: Any) -> dict[str, torch.Tensor]:
    """The tensors, by name on disk, that hold codes or a matrix [experts?, rows, columns] in a canonical checkpoint."""
    return encode(weight, value) if isinstance(value, QTensor) else {weight.name: as_matrix(weight, value)}


def decode(weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
    """The inverse of `encode`; `tensors` by name on disk."""
    import torch

    from compress.numerics import bitstream

    assert state.scheme is not None
    parts = {part: tensors[f"{weight.name}.{part}"] for part in PARTS if f"{weight.name}.{part}" in tensors}
    codes = bitstream.unpack(parts["codes"], state.scheme.bits, weight.columns)
    if (bits := state.scheme.scale_bits) > 0:
        least = -(1 << (bits - 1)) if state.scheme.symmetric else 0
        for name in {"scale", "minimum"} & parts.keys():
            numbers = bitstream.unpack(parts[name], bits, state.scheme.groups(weight.columns))
            parts[name] = (numbers.to(torch.int16) + least).to(torch.int8)
    return with_beside(state, codes, parts["scale"], parts.get("zero"), parts)


def parts_beside(q: QTensor) -> dict[str, torch.Tensor | None]:
    """The parts besides codes, scale and zero, by their suffix on disk."""
    import torch

    parts: dict[str, torch.Tensor | None] = {name: getattr(q, name) for name in _CODES[3:]}
    if q.scheme.input_divisor and q.input_scale is None:
        parts["input_scale"] = q.scale.new_ones((), dtype=torch.float32)
    for whole, words in ((q.outliers, _OUTLIERS), (q.kept, _COLUMNS), (q.lowrank, _LOWRANK)):
        parts |= {part: getattr(whole, word) for part, word in words.items() if whole is not None}
    return parts


def with_beside(
    state: State, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, parts: Mapping[str, torch.Tensor]
) -> QTensor:  # fmt: skip
    """Codes with the corrections in `parts`, which may hold more."""
    from compress.numerics.columns import KeptColumns
    from compress.numerics.lowrank import Factors
    from compress.numerics.outliers import Sparse

    assert state.scheme is not None
    outliers = Sparse(**{word: parts[part] for part, word in _OUTLIERS.items()}) if state.outliers else None
    kept = KeptColumns(**{word: parts.get(part) for part, word in _COLUMNS.items()}) if state.columns else None  # type: ignore[arg-type]
    lowrank = Factors(**{word: parts.get(part) for part, word in _LOWRANK.items()}) if state.lowrank else None  # type: ignore[arg-type]
    rest = {name: parts.get(name) for name in ("minimum", *_CODES[5:])}
    return QTensor(state.scheme, codes, scale, zero, parts.get("tensor_scale"), outliers, lowrank, kept=kept, **rest)
