"""Third-party backends: products of other packages, where they are installed.

Each gets our codes; one that cannot use them rounds the same values itself, and `exact` is then the product by its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import linear

from compress.kernels.native.packed import Packed

_TORCH_GROUPS = (32, 64, 128, 256)
_INNER_TILES = 8
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Other:
    """A product x [tokens, columns] -> [tokens, rows] by third-party code."""

    weight_bytes: int
    copy: Callable[[], Call]
    """Makes the product with another copy of the weight."""
    exact: Call | None = None
    """Its exact product in fp32, if it does not multiply by our codes."""


def others(packed: Packed, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Other]]]:
    """(name, function that makes it) of the products that support the weight on its device; the function may raise anything."""
    scheme = packed.state.scheme
    if scheme is None or scheme.inputs or scheme.minimum or packed.halved or not packed.parts["tiles"].is_cuda:
        return
    four = scheme.integer and scheme.bits == 4 and scheme.group in _TORCH_GROUPS and packed.columns % scheme.group == 0
    if four and dtype == torch.bfloat16 and packed.columns % (16 * _INNER_TILES) == 0:
        yield "torch int4pack", partial(_tinygemm, packed)
    if four and find_spec("gemlite"):
        yield "gemlite", partial(_gemlite, packed, dtype)
    if str(scheme).startswith(("nf4g", "fp4g")) and not scheme.rule and find_spec("bitsandbytes"):
        yield "bitsandbytes", partial(_bitsandbytes, packed, dtype)


def _tinygemm(packed: Packed) -> Other:
    """torch._weight_int4pack_mm, w = (code - 8) s + z."""
    q, group = packed.unpack(), packed.scheme.group
    pairs = (q.codes[:, ::2] << 4) | q.codes[:, 1::2]
    words = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_TILES)
    zero = torch.zeros_like(q.scale) if q.zero is None else (8 - q.zero.float()) * q.scale.float()
    scales = torch.stack([q.scale.bfloat16(), zero.bfloat16()], -1).transpose(0, 1).contiguous()

    def copy() -> Call:
        w, sz = words.clone(), scales.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, w, group, sz)

    return Other(words.nbytes + scales.nbytes, copy)


def _gemlite(packed: Packed, dtype: torch.dtype) -> Other:
    import gemlite

    gemlite.set_autotune("fast")
    q = packed.unpack()
    kind = gemlite.DType.BF16 if dtype == torch.bfloat16 else gemlite.DType.FP16
    zero = torch.full_like(q.scale, 8) if q.zero is None else q.zero.to(dtype)

    def copy() -> Any:
        layer = gemlite.GemLiteLinear(4, packed.scheme.group, packed.columns, packed.rows, input_dtype=kind, output_dtype=kind)
        layer.pack(q.codes, q.scale.to(dtype), zero, None)
        return layer

    return Other(q.codes.nbytes // 2 + 2 * q.scale.nbytes, copy)


def _bitsandbytes(packed: Packed, dtype: torch.dtype) -> Other:
    """bitsandbytes, which rounds our dequantized weights again, with its own scales."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    kind = str(packed.scheme)[:3]
    codes, state = quantize_4bit(packed.unpack().dequantize().to(dtype), blocksize=packed.scheme.group, quant_type=kind)
    meant = dequantize_4bit(codes, state).float()

    def copy() -> Call:
        own = codes.clone()
        return lambda x: bnb.matmul_4bit(x, own.t(), state)

    return Other(codes.nbytes + state.absmax.nbytes, copy, lambda x: linear(x.float(), meant))
