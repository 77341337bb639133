"""FP8 checkpoints with block scales, as DeepSeek and transformers write.

    NAME             float8_e4m3fn [out, in], or [experts, ., .] for fused experts
    NAME_scale_inv   fp32, E8M0 or its bytes [ceil(out / 128), ceil(in / 128)]; one value where weight_block_size is null
DeepSeek-V4 calls a scale `.scale`, Mistral `.qscale_weight`, an embedding `.weight_scale`. Experts may be pairs of
E2M1 in int8 [out, in / 2] with E8M0 scales [out, in / 32] (`expert_dtype: fp4`).
w = weight * scale in fp32, rounded once to the dtype of the model, as DeepSeek's weight_dequant and transformers'
Fp8Dequantize do. Blocks have the size weight_block_size if the grid of scales fits it (last ones may be cut short);
else, as in transformers, the grid divides the weight evenly. Codes are kept for blocks of 128 by 128, rows or the whole
matrix, and for E2M1 with scales per 32. Other weights become dense, and fused experts too, because nothing tells their
orientation. Scales of activations are dropped.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.importers.floats import e8m0, pairs, spread
from compress.importers.packed import Foreign, Packed, Reader, Stored
from compress.importers.words import by_rows
from compress.numerics.bitstream import unpack
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import BLOCK, Scheme
from compress.spec.weight_state import Note

if TYPE_CHECKING:
    from compress.checkpoint.safetensors_header import TensorRef

_F8 = frozenset({"F8_E4M3", "F8_E5M2"})
_FP4 = frozenset({"I8"})
_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
_SCALE_NAMES = ("_scale_inv", "_scale")
_MODULE_SCALES = (".scale", ".qscale_weight")
_DROPPED = ("activation_scale", "input_scale", "qscale_act")
_NOTE = "no scheme here has floats in blocks of {block[0]} by {block[1]}, so it is dense"
_NOTE_FUSED = "nothing tells how fused experts lie, so they are dense"


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every tensor of small floats with its scale. Raises InputError."""
    block = config.get("weight_block_size")
    if block is not None and (
        not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise stored.bad_config("weight_block_size of two numbers above 0, or null", block)
    pair = (block[0], block[1]) if block else None
    names = [name for name, ref in stored.refs.items() if ref.dtype in _F8]
    names += [name for name, ref in stored.refs.items() if ref.dtype in _FP4 and len(ref.shape) > 1 and _scale(stored, name)]
    weights = stored.gather(names, lambda name: _weight(stored, name, pair))
    # `up_proj.activation_scale` of `up_proj.weight`, `gate_up_proj_activation_scale` of `gate_up_proj`.
    owners = [name.removesuffix("weight") if name.endswith(".weight") else f"{name}_" for name in weights]
    dropped = [name for owner in owners for part in _DROPPED if (name := owner + part) in stored.refs]
    notes = [Note("dropped", "scales of activations: the weights are read alone", tuple(dropped))] if dropped else []
    return stored.foreign(weights, dropped, notes)


def _scale(stored: Stored, name: str) -> str:
    """The name of a weight's scale, empty if it has none."""
    module, _, attribute = name.rpartition(".")
    names = [name + suffix for suffix in _SCALE_NAMES]
    names += [module + suffix for suffix in _MODULE_SCALES] if attribute == "weight" else []
    return next((found for found in names if found in stored.refs), "")


def _weight(stored: Stored, name: str, block: tuple[int, int] | None) -> Packed:
    weight = stored.refs[name]
    scale = stored.ref(_scale(stored, name) or f"{name}_scale_inv", _SCALES)
    if len(weight.shape) not in (2, 3):
        raise stored.bad(name, "two dimensions, or three for experts", f"shape {list(weight.shape)}")
    fp4 = weight.dtype in _FP4
    shape = (*weight.shape[:-1], weight.shape[-1] * 2) if fp4 else weight.shape
    sizes = _blocks(stored, scale, shape, None if fp4 else block)
    dtype = stored.dense_dtype(scale.dtype)
    scheme = _scheme(weight, scale, sizes, shape) if len(shape) == 2 else None
    if scheme is not None:
        kept = partial(_read_codes, weight=name, scale=scale.name, rows=shape[0], columns=shape[1], scheme=scheme)
        return Packed(name, dtype, shape, scheme, (name, scale.name), kept)
    read = partial(_read, weight=name, scale=scale.name, shape=shape, block=sizes, dtype=torch_dtype(dtype))
    note = _NOTE.format(block=sizes) if len(shape) == 2 else _NOTE_FUSED
    return Packed(name, dtype, shape, None, (name, scale.name), read, note)


def _scheme(weight: TensorRef, scale: TensorRef, block: tuple[int, int], shape: tuple[int, ...]) -> Scheme | None:
    """The scheme with these values, None if no scheme has them."""
    if weight.dtype in _FP4:
        return Scheme.parse("mxfp4") if block == (1, 32) and scale.dtype in ("F8_E8M0", "U8") else None
    known = {(BLOCK, BLOCK): "-block", shape: "-tensor", (1, shape[1]): ""}
    kind = "fp8-e5m2" if weight.dtype == "F8_E5M2" else "fp8"
    return Scheme.parse(kind + known[block]) if block in known else None


def _read_codes(reader: Reader, *, weight: str, scale: str, rows: int, columns: int, scheme: Scheme) -> QTensor:
    codes, s = reader(weight).view(torch.uint8), reader(scale)
    if scheme.bits == 4:
        return QTensor(scheme, unpack(codes, 4, columns), s.view(torch.uint8))
    s = e8m0(s) if s.dtype == torch.uint8 else s.float()
    return QTensor(scheme, codes, s.reshape(scheme.grid_shape(rows, columns)))


def _blocks(stored: Stored, scale: TensorRef, shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = shape[-2:]
    lead, grid = shape[:-2], scale.shape
    if grid in ((), (1,)):
        grid = (*(1 for _ in lead), 1, 1)
        if lead not in ((), (1,)):
            raise stored.bad(scale.name, f"scales of {lead[0]} experts", str(list(scale.shape)))
    if block and grid == (*lead, -(-rows // block[0]), -(-columns // block[1])):
        return block
    if len(grid) == len(shape) and grid[:-2] == lead and min(grid[-2:]) and not (rows % grid[-2] or columns % grid[-1]):
        return rows // grid[-2], columns // grid[-1]
    expected = f"a grid of blocks {list(block) if block else 'that divide it'} over {list(shape)}"
    raise stored.bad(scale.name, expected, str(list(scale.shape)))


def _read(
    reader: Reader, *, weight: str, scale: str, shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    rows, columns = shape[-2:]
    packed, s = reader(weight), reader(scale)
    s = e8m0(s) if s.dtype == torch.uint8 else s.float()
    s = s.reshape(-1, -(-rows // block[0]), -(-columns // block[1]))
    matrices = packed.reshape(-1, *packed.shape[-2:])
    out = torch.empty(len(matrices), rows, columns, dtype=dtype)
    for i in range(len(matrices)):
        out[i] = by_rows((rows, columns), dtype, partial(_piece, matrices[i], s[i], block, columns), block[0])
    return out.reshape(shape)


def _piece(matrix: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], columns: int, rows: slice) -> torch.Tensor:
    """The dense values of some rows, which begin at a block, in fp32."""
    values = pairs(matrix[rows]) if matrix.dtype == torch.int8 else matrix[rows].float()
    grid = scale[rows.start // block[0] : -(-rows.stop // block[0])]
    return values * spread(grid, block, len(values), columns)
