"""GPTQ checkpoints, v1 and v2: codes kept, dense where inputs are out of order.

A linear [out, in] with b bits and groups of g inputs (-1: one group) is stored as
    NAME.qweight  int32 [in * b / 32, out]               a bit stream down each column
    NAME.qzeros   int32 [ceil(in / g), ceil(out * b / 32)]   a bit stream along each row
    NAME.scales   fp16 [ceil(in / g), out]
    NAME.g_idx    int32 [in]                             group of each input; i // g unless desc_act
w[n, k] = scales[g, n] * (q[k, n] - zero[g, n]) with g = g_idx[k], multiplied in the dtype of the scales.

Zero points: `gptq_v2` stores them, `gptq` (v1) stores zero - 1. In v1 an asymmetric zero point of 0 becomes a field of
all ones, which readers disagree on: those that add to each field read (field + 1) mod 2^b = 0, and so do we;
GPTQModel adds a constant to the packed word, where a carry changes the neighbour. A note counts such weights.
A symmetric checkpoint whose zeros are those of the other version is mislabelled (vLLM #38966) and read by its
zeros. If all zeros are the middle code, the scheme is symmetric, whatever the config says.

g_idx: if each run of g inputs belongs to one group, codes are kept and scales are reordered; else (desc_act) the weight
becomes dense, since no scheme has inputs out of order. If there are several groups, desc_act is off and g_idx is all
zeros, it was never filled and is ignored, as in text-generation-inference.
`dynamic` overrides bits, group_size and sym per module: the first regex that matches from the start decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.importers.packed import NOT_HERE, Foreign, Packed, Reader, Stored, joined
from compress.importers.words import CONV1D, IN_ORDER, TINY_GROUP, Order, along_rows, down_rows, expand, order_of, scheme_for
from compress.numerics.bitstream import row_bytes
from compress.numerics.qtensor import QTensor

if TYPE_CHECKING:
    from compress.spec.scheme import Scheme

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point."""
_OUT_OF_ORDER = "its inputs belong to groups out of order (desc_act), which no scheme has, so it is dense"
_UNFILLED = "its g_idx is all zeros beside several groups and was left out"
_MISLABELLED = "its zero points are those of the other checkpoint_format than the label says, and were read by what they are"
_NOT_MIDDLE = "the config says sym but its zero points are not the middle; they are kept"
_ALL_ONES = "zero points of all ones in v1, which readers do not agree on, were read as 0, (z + 1) mod 2^b"


@dataclass(frozen=True)
class Terms:
    """Quantization settings of one module, by the config."""

    bits: int
    group: int | None
    symmetric: bool
    offset: int
    """1 if stored zero points are one too small (v1), else 0."""
    reordered: bool


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every module with a qweight. Raises InputError."""
    checked = _format(stored, config)
    modules = [name.removesuffix(".qweight") for name in stored.refs if name.endswith(".qweight")]
    for name in stored.refs:
        module, _, part = name.rpartition(".")
        if part in ("qzeros", "g_idx") and f"{module}.qweight" not in stored.refs:
            raise stored.bad(name, f"{module}.qweight beside it", "none")
    return stored.foreign(stored.gather(modules, lambda module: _weight(stored, module, _terms(stored, config, module, checked))))


def _format(stored: Stored, config: dict[str, Any]) -> int:
    """The number to add to stored zero points. Raises InputError for an unknown packing."""
    name = config.get("format") or config.get("checkpoint_format") or "gptq"
    name = "marlin" if config.get("is_marlin_format") else name
    if not isinstance(name, str) or name not in _FORMATS:
        raise stored.bad_config("checkpoint_format gptq or gptq_v2", name, "save it anew as gptq with GPTQModel")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise stored.bad_config("pack_dtype int32", config["pack_dtype"], "save it anew with pack_dtype int32")
    return _FORMATS[name]


def _terms(stored: Stored, config: dict[str, Any], module: str, offset: int) -> Terms:
    config = {**config, **_override(stored, config.get("dynamic") or {}, module)}
    bits = config.get("bits", config.get("w_bit"))
    if bits not in _BITS or isinstance(bits, bool):
        raise stored.bad_config(f"bits among {', '.join(map(str, _BITS))} for {module}", bits)
    size = config.get("group_size", config.get("q_group_size", -1))
    size = -1 if size is None else size
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise stored.bad_config(f"a group_size of -1 or more than 0 for {module}", size)
    return Terms(bits, None if size == -1 else size, bool(config.get("sym", True)), offset, bool(config.get("desc_act")))


def _override(stored: Stored, dynamic: Any, module: str) -> dict[str, Any]:
    """The settings in `dynamic` for one module."""
    if not isinstance(dynamic, dict):
        raise stored.bad_config("an object in dynamic", dynamic)
    for pattern, values in dynamic.items():
        try:
            matched = re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, module)
        except re.error as error:
            raise stored.bad_config("regexes in dynamic", f"'{pattern}': {error}") from None
        if not matched:
            continue
        if pattern.startswith("-:"):
            raise stored.bad_config(f"{module} dense, by '{pattern}' in dynamic", "a qweight of it")
        if not isinstance(values, dict):
            raise stored.bad_config(f"an object under '{pattern}' in dynamic", values)
        return values
    return {}


def _weight(stored: Stored, module: str, terms: Terms) -> Packed:
    bits = terms.bits
    qweight, scales = stored.matrix(f"{module}.qweight", {"I32"}), stored.matrix(f"{module}.scales")
    groups, rows = scales.shape
    index = stored.ref(f"{module}.g_idx", {"I32", "I64"}) if f"{module}.g_idx" in stored.refs else None
    columns = index.shape[0] if index and index.shape else qweight.shape[0] * 32 // bits
    group = terms.group or columns
    stored.ref(qweight.name, {"I32"}, (row_bytes(columns, bits) // 4, rows))
    stored.ref(scales.name, {scales.dtype}, (-(-columns // group), rows))
    qzeros = stored.ref(f"{module}.qzeros", {"I32"}, (groups, row_bytes(rows, bits) // 4))
    offset, symmetric, zero_note = _zeros(stored, qzeros.name, terms, rows)
    order, order_note = IN_ORDER, ""
    if index is not None:
        order, order_note = _order(stored, index.name, terms, columns, groups)
    elif terms.reordered and groups > 1:
        raise stored.bad(f"{module}.g_idx", "the group of each input, by desc_act", "none")
    dtype, dtype_note = stored.code_dtype(scales.name)
    scheme = scheme_for(bits, terms.group, symmetric)
    reason = "" if scheme else TINY_GROUP
    conv1d = stored.conv1d(module)
    if conv1d or order.scattered:
        scheme, reason = None, CONV1D if conv1d else _OUT_OF_ORDER
    read = partial(_read, module=module, bits=bits, offset=offset, symmetric=symmetric, columns=columns, group=group,
                   order=order, scheme=scheme, dtype=dtype, turned=conv1d)  # fmt: skip
    parts = (qweight.name, qzeros.name, scales.name, *([index.name] if index else []))
    shape = (columns, rows) if conv1d else (rows, columns)
    note = joined(reason, order_note, zero_note, dtype_note)
    return Packed(f"{module}.weight", dtype, shape, scheme, parts, read, note)


def _zeros(stored: Stored, name: str, terms: Terms, rows: int) -> tuple[int, bool, str]:
    """(number to add to the stored zero points, whether all are then the middle code, a note)."""
    words = stored.peek(name)
    if words is None:
        return terms.offset, terms.symmetric, NOT_HERE
    levels, middle = 1 << terms.bits, 1 << (terms.bits - 1)
    fields = along_rows(words, terms.bits, rows)
    low, high = int(fields.min()), int(fields.max())
    offset, note = terms.offset, ""
    if terms.symmetric and low == high == middle - (1 - offset):
        offset, note = 1 - offset, _MISLABELLED
    if low == high == middle - offset:
        return offset, True, note
    note = _NOT_MIDDLE if terms.symmetric else ""
    return offset, False, joined(note, _ALL_ONES if offset and high == levels - 1 else "")


def _order(stored: Stored, name: str, terms: Terms, columns: int, groups: int) -> tuple[Order, str]:
    """The group of each input, and a note."""
    index = stored.peek(name)
    if index is None:
        return (Order(scattered=True) if terms.reordered and groups > 1 else IN_ORDER), NOT_HERE
    order = order_of(stored, name, index, terms.group or columns, groups)
    if not terms.reordered and groups > 1 and not bool(index.any()):
        return IN_ORDER, _UNFILLED
    return order, ""


def _read(
    reader: Reader, *, module: str, bits: int, offset: int, symmetric: bool, columns: int, group: int,
    order: Order, scheme: Scheme | None, dtype: str, turned: bool,
) -> QTensor | torch.Tensor:  # fmt: skip
    codes = down_rows(reader(f"{module}.qweight"), bits, columns)
    scale = reader(f"{module}.scales").T
    zero = None
    if not symmetric:
        fields = along_rows(reader(f"{module}.qzeros"), bits, codes.shape[0])
        # In uint8 an 8-bit field wraps by itself; the mask does so for the narrower ones.
        zero = ((fields + offset) & ((1 << bits) - 1)).T
    if order.runs is not None:
        scale, zero = scale[:, order.runs], None if zero is None else zero[:, order.runs]
    kind = torch_dtype(dtype)
    if scheme is not None:
        return QTensor(scheme, codes, scale.to(kind).contiguous(), None if zero is None else zero.contiguous())
    index = reader(f"{module}.g_idx").to(torch.int64) if order.scattered else torch.arange(columns) // group
    weight = expand(codes, scale.to(kind), zero if zero is not None else 1 << (bits - 1), index, kind)
    return weight.T.contiguous() if turned else weight
