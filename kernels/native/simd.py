"""simd backend: our C++ kernels for CPUs, on the layout as it is stored.

Few tokens are multiplied by codes directly, exactly within the formats: values of codes are fp32, or bfloat16 where they are
bfloat16 numbers and activations too, and sums of a group are in fp32. For many tokens values are rounded to the dtype of
activations first, as in a dense weight: by the same kernels where they multiply pairs of bfloat16 numbers, up to as many as a
prompt has; else a chunk of rows is expanded, as the cpu backend does it, and multiplied by torch.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch

from compress.errors import Refusal
from compress.kernels.cpu.library import DTYPES, GRIDS, SCALES, CWeight, library
from compress.kernels.dispatch import Work
from compress.kernels.native.cpu import by_chunks
from compress.kernels.native.fused import Fused, scales, shift
from compress.kernels.native.packed import Packed
from compress.spec.corrections import SHORT
from compress.spec.scheme import FP8, Scheme
from compress.spec.weight_state import State

_TOKENS, _TOKENS_IN_FP32, _TOKENS_IN_PAIRS = 96, 24, 8
"""The most tokens for which exact products are faster than those by rounded values. The second where torch multiplies in half
precision, and values of codes are no bfloat16 numbers; the third there, where kernels of ours multiply what is rounded."""
_TOKENS_ROUNDED = 512
"""The most tokens for which kernels of ours multiply what is rounded faster than torch does."""
_CACHED = 1 << 21
"""The most activations that a cache holds: with more of them codes are decoded several times; those of 8 bits take longest."""


class Simd(Fused):
    """Runs every scheme but K-quants."""

    name = "simd"

    def refuse(self, work: Work) -> None:
        scheme = work.state.scheme
        if work.device != "cpu":
            raise Refusal(f"the weight lies on {work.device}", "load the model on the CPU")
        if scheme is None:
            raise Refusal("it is not in codes", "use another backend")
        if work.turned:
            raise Refusal("a Conv1D adds over its rows", "leave the backend to be chosen")
        if work.dtype not in DTYPES:
            raise Refusal(f"activations are {str(work.dtype)[6:]}", "load the model in bfloat16, float16 or float32")
        if work.scales not in SCALES:
            raise Refusal(f"scales are {str(work.scales)[6:]}", "use cpu or reference")
        library()

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in DTYPES or packed.state.beside():
            return super().rows(packed, rows, dtype)
        out = packed.parts["tiles"].new_empty(rows.stop - rows.start, packed.columns, dtype=dtype)
        library().expand(weight_of(packed), rows, out)
        return out

    def lookup(self, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        if packed.state.beside():
            return super().lookup(packed, ids)
        out = torch.empty(len(ids), packed.columns)
        library().expand(weight_of(packed), ids, out)
        return out

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        tokens = x.shape[0]
        rounded = tokens > exact_up_to(packed, x.dtype)
        again = packed.scheme.bits == 8 and tokens * packed.columns > _CACHED
        if rounded and (tokens > _TOKENS_ROUNDED or again or not _pairs(x.dtype)):
            return by_chunks(self, x, packed, bias)
        out = self.product(x, packed, bias, rounded)
        return out if packed.state.lowrank is None else out.add_(packed.by_factors(x))

    def product(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, rounded: bool = False) -> torch.Tensor:
        x, out = x if x.stride(1) == 1 else x.contiguous(), x.new_empty(x.shape[0], packed.rows)
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        library().product(weight_of(packed), x, bias, out, rounded=rounded)
        return out

    def grouped(self, x: torch.Tensor, packed: Packed, offsets: torch.Tensor) -> torch.Tensor:
        # Outliers and low-rank factors belong to single matrices.
        if packed.state.beside():
            return super().grouped(x, packed, offsets)
        most = _most(offsets)
        rounded = most > exact_up_to(packed, x.dtype)
        if rounded and (most > _TOKENS_ROUNDED or not _pairs(x.dtype)):
            return super().grouped(x, packed, offsets)
        x, out = x.contiguous(), x.new_empty(len(x), packed.rows)
        library().product(weight_of(packed), x, None, out, offsets.int().contiguous(), rounded)
        return out


def exact_up_to(packed: Packed, dtype: torch.dtype) -> int:
    """The most tokens by which values are multiplied unrounded."""
    if dtype == torch.float32 or weight_of(packed).exact:
        return _TOKENS
    return _TOKENS_IN_PAIRS if _pairs(dtype) else _TOKENS_IN_FP32


def _pairs(dtype: torch.dtype) -> bool:
    """Whether kernels of ours multiply what is rounded. Torch alone has AMX, where there is such."""
    return dtype == torch.bfloat16 and library().isa == "avx512bf16" and not torch.cpu._is_amx_tile_supported()


def _most(offsets: torch.Tensor) -> int:
    """The tokens of the expert that has most."""
    ends: list[int] = offsets.tolist()
    return max(until - start for start, until in pairwise(ends))


_KEPT: dict[tuple[int, ...], tuple[State, int, int, tuple[str, ...], CWeight]] = {}
"""Weights as the library gets them, by the addresses of their parts: making one anew takes as long as a small product."""
_KEPT_AT_MOST = 1 << 14


def weight_of(packed: Packed) -> CWeight:
    """A prepared weight as the library gets it. It has the addresses of its parts, which must outlive it."""
    if (made := packed.made.get("simd")) is not None:
        return made  # type: ignore[no-any-return]
    places, names = tuple([part.data_ptr() for part in packed.parts.values()]), (*packed.parts,)
    kept = _KEPT.get(places)
    # A tensor of another model may lie where one of these has lain.
    if kept is None or kept[0] is not packed.state or kept[1:4] != (packed.rows, packed.columns, names):
        if len(_KEPT) >= _KEPT_AT_MOST:
            _KEPT.clear()
        kept = _KEPT[places] = packed.state, packed.rows, packed.columns, names, _weight(packed)
    packed.made["simd"] = kept[4]
    return kept[4]


def _weight(packed: Packed) -> CWeight:
    scheme, scale, parts = packed.scheme, scales(packed), packed.parts
    names = ("zero", "minimum", "tensor_scale", "outlier_deltas", "outlier_columns", "outlier_offsets")
    zero, minimum, divisor, *outliers = (parts[name].data_ptr() if name in parts else None for name in names)
    grid = scheme.grid if scheme.grid in FP8 else "table" if scheme.bits <= 4 else "int"
    values = table(scheme if grid == "table" else None)
    exact = torch.equal(values.bfloat16().float(), values)
    return CWeight(
        parts["tiles"].data_ptr(), scale.data_ptr(), zero, minimum, divisor, values.data_ptr(), *outliers,
        packed.rows, packed.columns, parts["tiles"].shape[-3], scale.shape[-2],
        scheme.bits, GRIDS[grid], SCALES[scale.dtype], shift(packed), scheme.middle if scheme.integer else 0, exact,
        packed.columns > SHORT,
    )  # fmt: skip


@lru_cache(maxsize=64)
def table(scheme: Scheme | None) -> torch.Tensor:
    """The values of codes of up to 4 bits, fp32 [16], repeated if there are fewer; of integers less the middle code."""
    if scheme is None:
        return torch.zeros(16)
    codes = torch.arange(16, dtype=torch.uint8) % scheme.levels
    if scheme.integer:
        return codes.float() - scheme.middle
    from compress.numerics.floats import decode

    return decode(codes, scheme)
