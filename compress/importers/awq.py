"""AWQ checkpoints in the gemm layout of AutoAWQ: 4-bit codes kept.

A linear [out, in] with groups of g inputs (-1: one group) is stored as
    NAME.qweight  int32 [in, out / 8]
    NAME.qzeros   int32 [in / g, out / 8]   the zero point itself, no minus one; absent in some symmetric files
    NAME.scales   fp16 [in / g, out]
Nibble j of a word, counted from the lowest, holds output [0, 2, 4, 6, 1, 3, 5, 7][j] of its eight.
w[n, k] = scales[g, n] * (q[k, n] - zero[g, n]), multiplied in the dtype of the scales: fp32 holds the product exactly, so
QTensor's value rounded to that dtype is the same. If all zeros are 8, the scheme is symmetric. The layouts
gemv, gemv_fast, marlin and exllama order words in another way and are refused.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.importers.packed import NOT_HERE, Foreign, Packed, Reader, Stored, joined, steps
from compress.importers.words import CONV1D, TINY_GROUP, expand, scheme_for
from compress.numerics import bitstream
from compress.numerics.qtensor import QTensor

if TYPE_CHECKING:
    from compress.spec.scheme import Scheme

_BITS, _MIDDLE, _PER_WORD = 4, 8, 8
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble that holds each output of a word."""


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every module with a qweight. Raises InputError."""
    version = config.get("version") or config.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise stored.bad_config("version gemm", version, "save it anew with AutoAWQ's version='GEMM'")
    bits = config.get("bits", config.get("w_bit"))
    if bits != _BITS:
        raise stored.bad_config(f"bits {_BITS}", bits)
    size = config.get("group_size", config.get("q_group_size", 128))
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise stored.bad_config("a group_size of -1 or more than 0", size)
    symmetric = config.get("zero_point", True) is False
    modules = [name.removesuffix(".qweight") for name in stored.refs if name.endswith(".qweight")]
    group = None if size == -1 else size
    return stored.foreign(stored.gather(modules, lambda module: _weight(stored, module, group, symmetric)))


def _weight(stored: Stored, module: str, size: int | None, symmetric: bool) -> Packed:
    qweight, scales = stored.matrix(f"{module}.qweight", {"I32"}), stored.matrix(f"{module}.scales")
    columns, rows = qweight.shape[0], scales.shape[1]
    group = size or columns
    if rows % _PER_WORD:
        raise stored.bad(scales.name, f"outputs that are a multiple of {_PER_WORD}", str(rows))
    groups = -(-columns // group)
    stored.ref(qweight.name, {"I32"}, (columns, rows // _PER_WORD))
    stored.ref(scales.name, {scales.dtype}, (groups, rows))
    parts, note = [qweight.name, scales.name], ""
    if f"{module}.qzeros" in stored.refs or not symmetric:
        qzeros = stored.ref(f"{module}.qzeros", {"I32"}, (groups, rows // _PER_WORD))
        parts.append(qzeros.name)
        words = stored.peek(qzeros.name)
        note = NOT_HERE if words is None else ""
        # Eight in every nibble; the order of the nibbles does not matter for that.
        symmetric = symmetric if words is None else bool((words.view(torch.uint8) == 0x88).all())
    dtype, dtype_note = stored.code_dtype(scales.name)
    conv1d = stored.conv1d(module)
    scheme = None if conv1d else scheme_for(_BITS, size, symmetric)
    reason = "" if scheme else CONV1D if conv1d else TINY_GROUP
    read = partial(_read, module=module, symmetric=symmetric, group=group, scheme=scheme, dtype=dtype, turned=conv1d)
    shape = (columns, rows) if conv1d else (rows, columns)
    return Packed(f"{module}.weight", dtype, shape, scheme, tuple(parts), read, joined(reason, note, dtype_note))


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 words [rows, words] -> uint8 [rows, 8 words], outputs in order."""
    stream = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    nibbles = bitstream.unpack(stream, _BITS, words.shape[1] * _PER_WORD)
    ordered: torch.Tensor = nibbles.unflatten(-1, (-1, _PER_WORD))[..., list(_NIBBLE_OF)].flatten(-2)
    return ordered


def _read(
    reader: Reader, *, module: str, symmetric: bool, group: int, scheme: Scheme | None, dtype: str, turned: bool
) -> QTensor | torch.Tensor:
    words = reader(f"{module}.qweight")
    columns, rows = words.shape[0], words.shape[1] * _PER_WORD
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for inputs in steps(columns, rows):
        codes[:, inputs] = _outputs(words[inputs]).T
    kind = torch_dtype(dtype)
    scale = reader(f"{module}.scales").T.to(kind).contiguous()
    zero = None if symmetric else _outputs(reader(f"{module}.qzeros")).T.contiguous()
    if scheme is not None:
        return QTensor(scheme, codes, scale, zero)
    index = torch.arange(columns) // group
    weight = expand(codes, scale, _MIDDLE if zero is None else zero, index, kind)
    return weight.T.contiguous() if turned else weight
