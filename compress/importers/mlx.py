"""MLX checkpoints, as mlx-lm writes them: affine codes kept, MXFP4 too.

A matrix [out, in], linear or embedding, is stored as
    NAME.weight   uint32 [out, in * b / 32]   codes, one bit stream per row
    NAME.scales   [out, in / g]               in the dtype of the model; uint8 powers of two (E8M0) for mxfp4
    NAME.biases   as scales                   the value of code 0; none for mxfp4
with bits and group size by module, else those of the whole model. w = scales * code + biases, which MLX computes in the dtype of
activations. If every bias is the scale times -2^(b-1), the scheme is symmetric. Modes nvfp4 and mxfp8 are refused, and experts
that are stacked in one tensor.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.importers.packed import NOT_HERE, Foreign, Packed, Reader, Stored, joined
from compress.numerics import bitstream
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import BITS, Scheme

if TYPE_CHECKING:
    from compress.checkpoint.safetensors_header import TensorRef

_GROUPS = (32, 64, 128)
_DO = "start from the model it was made from"


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every module with scales. Raises InputError."""
    modules = [name.removesuffix(".scales") for name in stored.refs if name.endswith(".scales")]
    return stored.foreign(stored.gather(modules, lambda module: _weight(stored, module, config)))


def _weight(stored: Stored, module: str, config: dict[str, Any]) -> Packed:
    own = config.get(module)
    mode, bits, group = _settings(stored, module, {**config, **own} if isinstance(own, dict) else config)
    name = f"{module}.weight"
    if name in stored.refs and len(stored.refs[name].shape) == 3:
        raise stored.bad(name, "a tensor for each expert", "experts in one tensor", _DO)
    words = stored.matrix(name, {"U32"})
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    if columns * bits != words.shape[1] * 32 or columns % group:
        raise stored.bad(name, f"rows of {bits}-bit codes in groups of {group}", f"{words.shape[1]} words in a row")
    grid = (rows, columns // group)
    if mode == "mxfp4":
        scales = stored.ref(f"{module}.scales", {"U8"}, grid)
        scheme, dtype = Scheme.parse("mxfp4"), stored.dense_dtype()
        read = partial(_read, module=module, scheme=scheme, columns=columns, dtype="U8")
        return Packed(name, dtype, (rows, columns), scheme, (name, scales.name), read)
    scales = stored.ref(f"{module}.scales", {"F32", "F16", "BF16"}, grid)
    biases = stored.ref(f"{module}.biases", {scales.dtype}, grid)
    dtype, note = stored.code_dtype(scales.name)
    if dtype != scales.dtype:
        dtype, other = stored.code_dtype(biases.name)
        note = note or other
    symmetric, unseen = _balanced(stored, scales, biases, bits)
    scheme = Scheme(bits, group, symmetric, minimum=not symmetric)
    read = partial(_read, module=module, scheme=scheme, columns=columns, dtype=dtype)
    return Packed(name, dtype, (rows, columns), scheme, (name, scales.name, biases.name), read, joined(unseen, note))


def _settings(stored: Stored, module: str, said: dict[str, Any]) -> tuple[str, int, int]:
    """(mode, bits, group) of a module. Raises InputError for what is not read here."""
    mode, bits, group = said.get("mode", "affine"), said.get("bits"), said.get("group_size")
    if mode not in ("affine", "mxfp4"):
        raise stored.bad_config(f"mode affine or mxfp4 for {module}", mode, _DO)
    if mode == "mxfp4" and (bits, group) != (4, 32):
        raise stored.bad_config(f"4 bits in groups of 32 for {module} in mxfp4", f"{bits} bits in groups of {group}")
    if type(bits) is not int or bits not in BITS:
        raise stored.bad_config(f"bits among {', '.join(map(str, BITS))} for {module}", bits)
    if type(group) is not int or group not in _GROUPS:
        raise stored.bad_config(f"group_size 32, 64 or 128 for {module}", group)
    return mode, bits, group


def _balanced(stored: Stored, scales: TensorRef, biases: TensorRef, bits: int) -> tuple[bool, str]:
    """Whether codes are balanced about zero, and a note if that cannot be seen here."""
    scale, bias = stored.peek(scales.name), stored.peek(biases.name)
    if scale is None or bias is None:
        return False, NOT_HERE
    return bool((bias == scale * -(1 << (bits - 1))).all()), ""


def _read(reader: Reader, *, module: str, scheme: Scheme, columns: int, dtype: str) -> QTensor:
    codes = bitstream.unpack(reader(f"{module}.weight").view(torch.uint8), scheme.bits, columns)
    kind = torch_dtype(dtype)
    minimum = reader(f"{module}.biases").to(kind) if scheme.minimum else None
    return QTensor(scheme, codes, reader(f"{module}.scales").to(kind), minimum=minimum)
