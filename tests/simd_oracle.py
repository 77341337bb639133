"""Every scheme by a library of CPU kernels, and attention, against fp64, and blocks. As a program it checks a library that is not loaded elsewhere.

python simd_oracle.py LIBRARY ISA
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from compress.kernels.cpu import build
from compress.kernels.cpu.library import Library
from compress.kernels.native import simd
from compress.kernels.native.packed import Packed, pack
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State

SCHEMES = (
    "w2a16g16", "w2a16g32-asym", "w2a16g256", "w2a16", "w3a16g16-min", "w3a16g32", "w3a16g64-asym", "w3a16g128", "w3a16-min",
    "w4a16g16-asym", "w4a16g32", "w4a16g64-asym", "w4a16g128", "w4a16g32-min", "w4a16", "w5a16g16", "w5a16g32", "w5a16g64-min",
    "w6a16g16-asym", "w6a16g64", "w6a16g32-min", "w8a16g16", "w8a16g64-asym", "w8a16", "nf4g64", "nf3g32", "nf2g16", "fp4g128",
    "e3m0g32", "fp8", "fp8-e5m2", "fp8-tensor", "fp8-block", "mxfp4", "nvfp4",
)  # fmt: skip
SHAPES = ((48, 256), (33, 768), (17, 304))
"""Rows and columns: of whole tiles and chunks, and of some that are not."""
TOKENS = (1, 3, 13, 41)
"""By rows, and by panels with all kinds of blocks."""
ROUNDED = 29
"""Tokens of a product by values that may be rounded first."""
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def prepared(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> tuple[Packed, torch.Tensor]:
    """A random weight as the backend keeps it, and its values in fp32."""
    q = nearest(torch.randn(rows, columns).to(dtype), scheme, dtype).q
    packed = Packed(State(scheme), rows, columns, pack(q))
    return Packed(State(scheme), rows, columns, simd.Simd().prepare(packed)), q.dequantize()


def differences(library: Library, text: str) -> Iterator[str]:
    """What a scheme gets wrong, a line each."""
    scheme = Scheme.parse(text)
    for rows, columns in SHAPES:
        if columns % (scheme.group or 1):
            continue
        for dtype in ROUNDING:
            packed, dense = prepared(scheme, rows, columns, dtype)
            yield from wrong(library, packed, dense, dtype, f"{library.isa}: {text}, {rows} x {columns}, {dtype}")


def wrong(library: Library, packed: Packed, dense: torch.Tensor, dtype: torch.dtype, where: str) -> Iterator[str]:
    """Values are the same bits; a product errs by its own rounding, and by 2^-21 of the sum of what is added up."""
    weight = simd.weight_of(packed)
    rows, columns = dense.shape
    whole = torch.empty(rows, columns, dtype=dtype)
    library.expand(weight, slice(0, rows), whole)
    if not torch.equal(whole, dense.to(dtype)):
        yield f"{where}: values"
    ids, some = torch.tensor([rows - 1, 0, 16, 3, 16]), torch.empty(5, columns, dtype=dtype)
    library.expand(weight, ids, some)
    if not torch.equal(some, dense[ids].to(dtype)):
        yield f"{where}: rows by number"
    bias = torch.randn(rows).to(dtype)
    for tokens in (*TOKENS, ROUNDED):
        x, out = torch.randn(tokens, columns + 8).to(dtype)[:, :columns], torch.empty(tokens, rows, dtype=dtype)
        library.product(weight, x, bias, out, rounded=tokens == ROUNDED)
        # What may be rounded is so everywhere, or nowhere.
        meant = (dense, dense.to(dtype).float()) if tokens == ROUNDED else (dense,)
        error = min(float(_error(out, x, w, bias).max()) for w in meant)
        if not error <= 1:
            yield f"{where}: {tokens} tokens, {error:.2f} of what may be"


def _error(out: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    exact = x.double() @ dense.double().T + bias.double()
    added = x.double().abs() @ dense.double().abs().T + bias.double().abs()
    return (out.double() - exact).abs() / (ROUNDING[out.dtype] * exact.abs() + 2.0**-21 * added)


BEST = simd.library().isa
ISAS = list(build.isas(build.machine()))
USABLE = ISAS[ISAS.index(BEST) :]
"""Instruction sets that this CPU has."""
ATTENTION = (
    (1, 9, 3, 512, 64, 64), (2, 4, 4, 1, 64, 64), (3, 8, 1, 257, 128, 80), (2, 6, 2, 1000, 80, 96), (1, 7, 1, 255, 256, 16), (1, 5, 5, 16, 16, 48),
)  # fmt: skip
"""Texts, heads of queries and of keys, keys, and the sizes of a key and of a value."""


def attends(library: Library, dtype: torch.dtype) -> Iterator[str]:
    """What attention gets wrong, a line each: it errs by its own rounding, and by 2^-20 of the largest value."""
    for batch, heads, groups, keys, size, values in ATTENTION:
        q, k = (torch.randn(shape).to(dtype) for shape in ((batch, heads, size), (batch, groups, keys, size)))
        v = torch.randn(batch, keys, groups, values).to(dtype).transpose(1, 2)
        some = torch.rand(batch, keys) > 0.4
        some[:, -1] = True
        for mask in (None, some):
            found, meant = library.attend(q, k, v, size**-0.5, mask), attention(q, k, v, size**-0.5, mask)
            error = (found.double() - meant).abs() / (ROUNDING[dtype] * meant.abs() + 2.0**-20 * v.double().abs().max())
            if not bool((error <= 1).all()):
                where = (
                    f"{library.isa}: attention, {dtype}, {(batch, heads, groups, keys, size, values)}, mask {mask is not None}"
                )
                yield f"{where}: {float(error.max()):.2f} of what may be"


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(scale q k) v in fp64: q [batch, heads, size], k and v [batch, groups, keys, .], mask [batch, keys]."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhd,bhkd->bhk", q.double(), k) * scale
    scores = scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bhk,bhke->bhe", scores.softmax(-1), v)


def plain(library: Library, dtype: torch.dtype) -> Iterator[str]:
    """What products by plain matrices get wrong, a line each."""
    for rows, columns in ((48, 256), (33, 96), (1, 32), (1513, 32)):
        for tokens in (1, 2, 3, 4, 7, 21):
            (weight, _), (x, _) = (at_the_end_of_a_page(torch.randn(n, columns).to(dtype)) for n in (rows, tokens))
            bias = torch.randn(rows).to(dtype)
            for added in (bias, None):
                error = _error(library.dense(weight, x, added), x, weight, torch.zeros(rows) if added is None else added)
                if not float(error.max()) <= 1:
                    yield f"{library.isa}: plain, {rows} x {columns}, {dtype}, {tokens} tokens: {float(error.max()):.2f} of what may be"


def at_the_end_of_a_page(tensor: torch.Tensor) -> tuple[torch.Tensor, mmap.mmap]:
    """A copy after which comes a page that may not be touched."""
    size, page = tensor.numel() * tensor.itemsize, mmap.PAGESIZE
    room = mmap.mmap(-1, -(-size // page) * page + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + len(room) - page), page, 0) == 0
    found = (
        torch.frombuffer(room, dtype=torch.uint8, count=size, offset=len(room) - page - size)
        .view(tensor.dtype)
        .view(tensor.shape)
    )
    return found.copy_(tensor), room


if __name__ == "__main__":
    torch.manual_seed(0)
    held = Library(Path(sys.argv[1]), sys.argv[2])
    found = [line for scheme in SCHEMES for line in differences(held, scheme)]
    found += [line for dtype in ROUNDING for line in (*attends(held, dtype), *plain(held, dtype))]
    from block_oracle import block_differences
    from integers_oracle import INTEGERS, integer_differences

    found += [line for scheme in INTEGERS for line in integer_differences(held, scheme)]
    found += block_differences(held)
    said = f"{len(SCHEMES)} schemes, {len(INTEGERS)} by integers, and attention by {held.isa}: as fp64 has them"
    print("\n".join(found) or said)
    sys.exit(1 if found else 0)
