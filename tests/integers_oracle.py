"""Products of rounded activations by codes, as whole numbers, by a library of CPU kernels: against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch.nn.functional import pad

from compress.kernels.cpu.library import Library
from compress.kernels.native import integers
from compress.kernels.native.packed import Packed, pack
from compress.kernels.native.simd import weight_of
from compress.numerics.inputs import in_integers
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from simd_oracle import ROUNDING

INTEGERS = (
    "w2a8g32", "w2a16g64-asym", "w3a8g64-asym", "w3a16", "w4a8", "w4a8g128", "w4a8-asym", "w4a4", "w4a4-aasym", "w4a16g32",
    "w5a8g64", "w6a8g32-asym", "w8a8", "w8a8-aasym", "w8a8g256-asym", "w8a16g64",
)  # fmt: skip
SHAPES = ((48, 512), (33, 288), (17, 40))
"""Rows and columns: of whole tiles and blocks, and of some that are not."""
TOKENS = (1, 2, 7, 12, 29)
"""By blocks of tokens of every size."""


def prepared(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> tuple[Packed, torch.Tensor]:
    """A random weight as the backend keeps it, and its values in fp32."""
    q = nearest(torch.randn(rows, columns).to(dtype), scheme, dtype).q
    packed = Packed(State(scheme), rows, columns, pack(q))
    return Packed(State(scheme), rows, columns, integers.Integers().prepare(packed)), q.dequantize()


def rounded(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What activations [tokens, columns] become, fp64."""
    if scheme.inputs:
        q, s, z = in_integers(x, int(scheme.inputs[3]), scheme.inputs.endswith("-asym"))
        return (q.double() if z is None else q.double() - z.double()) * s.double()
    group = min(integers.SPAN, scheme.group or integers.SPAN)
    spans = pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    s = spans.abs().amax(-1, keepdim=True) / 127
    q = (spans / torch.where(s == 0, 1, s)).round()
    return (q.double() * s.double()).flatten(1)[:, : x.shape[1]]


def integer_differences(library: Library, text: str) -> Iterator[str]:
    """What a scheme gets wrong, a line each."""
    scheme = Scheme.parse(text)
    for (rows, columns), dtype in product(SHAPES, ROUNDING):
        if columns % (scheme.group or 1) == 0:
            packed, dense = prepared(scheme, rows, columns, dtype)
            yield from wrong(library, packed, dense, dtype, f"{library.isa}: integers, {text}, {rows} x {columns}, {dtype}")


def wrong(library: Library, packed: Packed, dense: torch.Tensor, dtype: torch.dtype, where: str) -> Iterator[str]:
    """Values are the same bits; a product errs by its own rounding, and by 2^-21 of the sum of what is added up."""
    weight, how, (rows, columns) = weight_of(packed), integers.rounding(packed), dense.shape
    ids, some = torch.tensor([rows - 1, 0, 16, 3, 16]), torch.empty(5, columns, dtype=dtype)
    library.expand(weight, ids, some, integers=True)
    if not torch.equal(some, dense[ids].to(dtype)):
        yield f"{where}: rows by number"
    bias = torch.randn(rows).to(dtype)
    for tokens in TOKENS:
        x, out = torch.randn(tokens, columns + 8).to(dtype)[:, :columns], torch.empty(tokens, rows, dtype=dtype)
        x[0, : columns // 2] *= 30
        x[-1] = 0
        library.integers(weight, how, x, bias, out)
        given, w = rounded(x, packed.scheme), dense.double()
        exact, added = given @ w.T + bias.double(), given.abs() @ w.abs().T + bias.double().abs()
        if packed.scheme.inputs.endswith("-asym"):
            # The zero point's part is taken from the rest: both are summed.
            added += 2 * x.double().abs().amax(-1, keepdim=True) * w.abs().sum(1)
        error = (out.double() - exact).abs() / (ROUNDING[dtype] * exact.abs() + 2.0**-21 * added).clamp(min=1e-30)
        if not bool((error <= 1).all()):
            yield f"{where}: {tokens} tokens, {float(error.max()):.2f} of what may be"
