"""GGUF files: codes of types that a scheme has are kept, other types dequantized.

Names, the order of rows of queries and keys, and Gemma's norms are taken back to transformers' (gguf_names.py); the bytes of
blocks are in numerics/gguf_blocks.py. A type whose values no scheme has (other IQ, TQ) becomes a dense weight by the
package `gguf`, with a counted note. In an artifact of ours the manifest tells the group of codes, a multiple of a block, and the
dtype of scales; another tool's scales are fp16. The number that NVFP4 multiplies a matrix by becomes its divisor, within 2^-23.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.errors import InputError
from compress.importers.gguf_names import (
    ARCHITECTURES,
    Architecture,
    Piece,
    from_pairs,
    is_norm,
    owner_of,
    paired_heads,
    pieces,
    scale_name,
)
from compress.importers.packed import Foreign, Packed, Reader, Stored, steps
from compress.numerics import gguf_superblocks
from compress.numerics.gguf_blocks import decode as blocks_of
from compress.numerics.gguf_blocks import scheme_text, type_of
from compress.numerics.qtensor import QTensor
from compress.spec.gguf_types import TYPES
from compress.spec.scheme import Scheme
from compress.spec.weight_state import FLOATS, State

if TYPE_CHECKING:
    from compress.checkpoint.safetensors_header import TensorRef

_DERIVED = ("rope_freqs.weight",)
"""Tensors that follow from the config."""


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every tensor of the file. Raises InputError."""
    kind = stored.checkpoint.config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if architecture is None:
        raise stored.bad_config(
            f"a model_type among {', '.join(ARCHITECTURES)}", f"'{kind}'", "start from the model it was made from"
        )
    owners: dict[str, list[str]] = {}
    scales = {scale_name(name) for name, ref in stored.refs.items() if ref.kind == "NVFP4"}
    beside = {*_DERIVED, *scales, *(f"{name.partition('[')[0].removesuffix('scale')}input_scale" for name in scales)}
    dropped = [name for name in stored.refs if name in beside]
    for name in stored.refs:
        if name not in beside:
            # A tensor without a place is refused under its own name.
            owners.setdefault(owner_of(architecture, name) or name, []).append(name)
    return stored.foreign(stored.gather(owners, lambda source: _weight(stored, architecture, source, owners[source])), dropped)


def _weight(stored: Stored, architecture: Architecture, source: str, names: list[str]) -> Packed:
    """One weight, from the tensor that holds it or, of fused experts, from the matrices of its pieces."""
    if source in stored.refs:
        raise stored.bad(source, f"a tensor of {architecture.name}", "one that transformers' model has no place for")
    parts = pieces(architecture, source)
    if len(names) > 1 or len(parts) > 1:
        return _fused(stored, source, parts, names)
    (name,) = names
    ref, config = stored.refs[name], stored.checkpoint.config
    kind, heads = TYPES[ref.kind], paired_heads(architecture, name, config)
    if heads and ref.shape[0] % (2 * heads):
        raise stored.bad(name, f"rows of {heads} heads", str(ref.shape[0]))
    if kind.dtype != "U8":
        added = architecture.one_added and is_norm(name)
        dtype = _plain_dtype(stored, ref, added)
        return Packed(
            source, dtype, ref.shape, None, (name,), partial(_read_plain, name=name, heads=heads, added=added, dtype=dtype)
        )
    shape = (*ref.shape[:-1], ref.shape[-1] // kind.nbytes * kind.weights)
    scheme, dtype = _scheme(stored, source, kind.name, shape[-1])
    if scheme is not None:
        number = _number(stored, name) if kind.name == "NVFP4" else ""
        read_codes = partial(_read_codes, name=name, heads=heads, scheme=scheme, dtype=dtype, number=number)
        return Packed(source, dtype, shape, scheme, (name, number) if number else (name,), read_codes)
    note = _dense_note(stored, name, kind.name)
    read = partial(_read_dense, name=name, heads=heads, kind=kind.name, dtype=dtype)
    return Packed(source, dtype, shape, None, (name,), read, note)


def _number(stored: Stored, name: str) -> str:
    """The tensor of the number that a matrix is multiplied by; empty if it is not."""
    number = scale_name(name)
    if number in stored.refs or number.replace(number[number.find("[") :], "[0]") in stored.refs:
        stored.ref(number, {"F32"}, (), (1,))
        return number
    return ""


def _dense_note(stored: Stored, name: str, kind: str) -> str:
    """Why a weight is dense. Raises InputError without the package that dequantizes it."""
    if find_spec("gguf") is None:
        raise stored.bad(
            name, f"the package gguf, which dequantizes {kind}", "no such package", "pip install 'compress-llm[gguf]'"
        )
    return f"no scheme here has the values of {kind}, so it is dense"


def _fused(stored: Stored, source: str, parts: list[Piece], names: list[str]) -> Packed:
    """Fused experts, or their biases, which a file has in pieces. The dense weight is [experts, in, out]."""
    found = [[name for name in names if name.partition("[")[0] == piece.name] for piece in parts]
    refs = [stored.refs[name] for name in names]
    uneven = len({len(each) for each in found}) > 1 or not found[0] or len({(ref.kind, ref.shape) for ref in refs}) > 1
    if uneven or len(refs[0].shape) != 2:
        raise stored.bad(source, "pieces of one type and shape, one for each expert", "others")
    kind, (*_, rows, columns), count = TYPES[refs[0].kind], refs[0].shape, len(found[0])
    if "[" not in names[0]:
        dtype = _plain_dtype(stored, refs[0], False)
        names_ = tuple(each[0] for each in found)
        return Packed(source, dtype, (rows, columns * len(parts)), None, names_, partial(_read_biases, names=names_, dtype=dtype))
    columns = columns // kind.nbytes * kind.weights if kind.dtype == "U8" else columns
    scheme, note = None, ""
    if kind.dtype != "U8":
        dtype = _plain_dtype(stored, refs[0], False)
    else:
        scheme, dtype = _scheme(stored, source, kind.name, columns)
        note = _dense_note(stored, names[0], kind.name) if scheme is None else ""

    def whole(parts_of: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """[experts, rows, ...] from the rows of the pieces, which alternate."""
        return torch.stack([torch.stack([parts_of(each[expert]) for each in found], 1).flatten(0, 1) for expert in range(count)])

    def read(reader: Reader) -> QTensor | torch.Tensor:
        if scheme is not None:
            return codes_of(scheme, dtype, whole(reader))
        if kind.dtype == "U8":
            dense = whole(lambda name: _dequantized(reader(name), kind.name, dtype))
        else:
            dense = whole(reader).to(torch_dtype(dtype))
        return dense.transpose(-1, -2).contiguous()

    flat = tuple(name for each in found for name in each)
    return Packed(source, dtype, (count, columns, rows * len(parts)), scheme, flat, read, note, transposed=True)


def _plain_dtype(stored: Stored, ref: TensorRef, added: bool) -> str:
    """The dtype of a tensor that is not in blocks: config.json's, if it holds the values."""
    if ref.dtype not in FLOATS:
        raise stored.bad(ref.name, "floats", ref.dtype)
    if len(ref.shape) > 1 and ref.dtype != "F32":
        return ref.dtype
    return stored.dtype or ref.dtype if added else stored.code_dtype(ref.name)[0]


def _scheme(stored: Stored, source: str, kind: str, columns: int) -> tuple[Scheme | None, str]:
    """The scheme of a tensor in blocks, None if there is none, and the dtype of the weight."""
    manifest = stored.checkpoint.manifest
    record = manifest.weights.get(source) if manifest is not None else None
    if record is not None and (own := State.parse(record.state).scheme) is not None:
        if type_of(own) != kind or columns % (own.group or columns):
            raise stored.bad(source, f"{own}, by the manifest", kind, "make the artifact anew")
        return own, record.dtype
    if not (text := scheme_text(kind)):
        return None, stored.dense_dtype("F16")
    scheme = Scheme.parse(text)
    return scheme, "F16" if scheme.scales == "row" else stored.dense_dtype("BF16")


def codes_of(scheme: Scheme, dtype: str, blocks: torch.Tensor, number: torch.Tensor | None = None) -> QTensor:
    """The codes in blocks [rows, bytes of a row]. Raises InputError where the scales of a group differ from block to block.

    `number` is what an NVFP4 matrix is multiplied by.
    """
    if scheme.scales == "k":
        return gguf_superblocks.decode(scheme, blocks)
    codes, scale, minimum = blocks_of(type_of(scheme), blocks)
    if scheme.scales != "row":
        if scheme.scales == "e4m3":
            number = torch.ones((), dtype=torch.float32) if number is None else number.reshape(()).reciprocal()
        return QTensor(scheme, codes, scale, tensor_scale=number)
    times, found = scale.shape[-1] // scheme.groups(codes.shape[-1]), []
    for part in (scale, minimum):
        groups = None if part is None else part.unflatten(-1, (-1, times))
        if groups is not None and not torch.equal(
            groups.contiguous().view(torch.uint8), groups[..., :1].expand_as(groups).contiguous().view(torch.uint8)
        ):
            raise InputError(f"codes of {scheme}", f"the same scale in {times} blocks", "others", "make the artifact anew")
        found.append(None if groups is None else groups[..., 0].to(torch_dtype(dtype)).contiguous())
    assert found[0] is not None
    return QTensor(scheme, codes, found[0], minimum=found[1])


def _read_codes(
    reader: Reader, *, name: str, heads: int, scheme: Scheme, dtype: str, number: str
) -> QTensor:  # fmt: skip
    blocks = reader(name)
    return codes_of(scheme, dtype, from_pairs(blocks, heads) if heads else blocks, reader(number) if number else None)


def _read_plain(reader: Reader, *, name: str, heads: int, added: bool, dtype: str) -> torch.Tensor:
    values = reader(name)
    values = values - 1 if added else values
    return (from_pairs(values, heads) if heads else values).to(torch_dtype(dtype)).contiguous()


def _read_dense(reader: Reader, *, name: str, heads: int, kind: str, dtype: str) -> torch.Tensor:
    out = _dequantized(reader(name), kind, dtype)
    return from_pairs(out, heads).contiguous() if heads else out


def _read_biases(reader: Reader, *, names: tuple[str, ...], dtype: str) -> torch.Tensor:
    """[experts, outputs], whose pieces alternate."""
    return torch.stack([reader(name) for name in names], -1).flatten(-2).to(torch_dtype(dtype))


def _dequantized(blocks: torch.Tensor, kind: str, dtype: str) -> torch.Tensor:
    """The values of blocks [rows, bytes of a row], some rows at a time."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    out = torch.empty(blocks.shape[0], blocks.shape[-1] // TYPES[kind].nbytes * TYPES[kind].weights, dtype=torch_dtype(dtype))
    for rows in steps(*out.shape):
        out[rows] = torch.from_numpy(dequantize(blocks[rows].numpy(), GGMLQuantizationType[kind])).to(out.dtype)
    return out
