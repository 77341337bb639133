"""QTensor: the one canonical quantized form, and how it lies on disk.

`codes` uint8 [experts?, rows, columns] in 0 .. levels - 1, `scale` [experts?, rows, groups] in the dense
weight's dtype, `zero` uint8 [experts?, rows, groups] (None when symmetric: the zero is then the middle code).
Rows are outputs and columns inputs, fused experts stored [in, out] included: y = x @ dequantize(q).T + b. A
Conv1D alone keeps its stored [in, out], y = x @ dequantize(q) + b, because the readers that know it group it so.

On disk a weight `NAME` becomes `NAME.codes` (uint8 bit stream per row), `NAME.scale` and `NAME.zero`.
`dequantize` defines the meaning; every quantizer returns a QTensor, every packer takes one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.facts import State, TensorSpec, Weight

if TYPE_CHECKING:
    import torch

    from compress.scheme import Scheme


@dataclass(frozen=True)
class QTensor:
    """Integer codes with their scales; see the module's caption for shapes."""

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def nonzero(self) -> torch.Tensor:
        """Which entries mean anything but zero, bool [experts?, rows, columns]."""
        if self.zero is None:
            return self.codes != self.scheme.middle
        group = self.scheme.group or self.codes.shape[-1]
        spread = self.zero.repeat_interleave(group, dim=-1)[..., : self.codes.shape[-1]]
        return self.codes != spread

    def dequantize(self) -> torch.Tensor:
        """fp32 weights [experts?, rows, columns]."""
        from compress.algebra.grid import dequantize

        return dequantize(self.codes, self.scale, self.zero, self.scheme)


def as_matrix(weight: Weight, stored: torch.Tensor) -> torch.Tensor:
    """A stored tensor seen as [experts?, rows, columns]; the function is its own inverse."""
    return stored.transpose(-1, -2) if weight.transposed and weight.experts is not None else stored


def along_inputs(weight: Weight, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [experts?, rows, columns] with its inputs last; its own inverse. Only a Conv1D has them elsewhere."""
    return matrix.transpose(-1, -2) if weight.transposed and weight.experts is None else matrix


def part_shapes(weight: Weight, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Shapes of codes (as a byte stream), scale and, if asymmetric, zero."""
    stream_bytes = math.ceil(weight.columns * scheme.bits / 32) * 4
    lead = (weight.rows,) if weight.experts is None else (weight.experts, weight.rows)
    shapes = {"codes": (*lead, stream_bytes), "scale": (*lead, scheme.groups(weight.columns))}
    if not scheme.symmetric:
        shapes["zero"] = shapes["scale"]
    return shapes


def specs(weight: Weight, state: State) -> list[TensorSpec]:
    """The tensors that hold `weight` in a canonical checkpoint."""
    if state.scheme is None:
        return [TensorSpec(weight.name, weight.dtype, weight.shape)]
    dtypes = {"codes": "U8", "scale": weight.dtype, "zero": "U8"}
    return [TensorSpec(f"{weight.name}.{part}", dtypes[part], shape) for part, shape in part_shapes(weight, state.scheme).items()]


def encode(weight: Weight, q: QTensor) -> dict[str, torch.Tensor]:
    """Canonical tensors by name on disk, in the order of `specs`."""
    from compress.algebra import bitstream

    parts = {"codes": bitstream.pack(q.codes, q.scheme.bits), "scale": q.scale.contiguous()}
    if q.zero is not None:
        parts["zero"] = q.zero.contiguous()
    return {f"{weight.name}.{part}": tensor for part, tensor in parts.items()}


def decode(weight: Weight, state: State, tensors: dict[str, torch.Tensor]) -> QTensor:
    """The inverse of `encode`; `tensors` by name on disk."""
    from compress.algebra import bitstream

    assert state.scheme is not None
    codes = bitstream.unpack(tensors[f"{weight.name}.codes"], state.scheme.bits, weight.columns)
    return QTensor(state.scheme, codes, tensors[f"{weight.name}.scale"], tensors.get(f"{weight.name}.zero"))
