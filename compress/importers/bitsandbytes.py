"""bitsandbytes checkpoints: NF4 as codes where blocks are groups, the rest dense.

A weight of 4 bits [out, in], flattened row by row in blocks of B elements, the even one in the high nibble:
    NAME                                     uint8 [numel / 2, 1], or the same bytes under another dtype
    NAME.absmax                              fp32 [blocks], or uint8 under double quantization
    NAME.quant_map                           fp32 [16], which readers ignore
    NAME.quant_state.bitsandbytes__nf4|fp4   JSON as bytes: shape, dtype, blocksize, nested_*
    NAME.nested_absmax, NAME.nested_quant_map    fp32: absmax = map[u] * nested_absmax + nested_offset, blocks of 256
w = code * absmax in fp32, rounded to the dtype of the JSON, then to the model's. int8: NAME int8 [out, in] with SCB
fp32 [out], w = (q * SCB) * 7.874015718698502e-3 in fp32 (bitsandbytes' int8_vectorwise_dequant). No single
scale SCB / 127 gives these bits, so it becomes dense. A Conv1D is transposed before it is quantized. NF4 blocks become groups
of columns if they divide a row, and the weight's dtype can hold the scale of each.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.errors import InputError
from compress.importers.packed import Foreign, Packed, Reader, Stored
from compress.importers.words import by_rows
from compress.numerics.floats import NF4
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import Scheme
from compress.spec.weight_state import DTYPE_BYTES

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_INT8_STEP = 7.874015718698502e-3
_NOTE = "no scheme here has the code book of its fp4, so it is dense"
_NOTE_NF4 = "its blocks are no groups of columns with scales that its dtype can hold (or are turned over), so it is dense"
_NOTE_INT8 = "its reader multiplies twice, which no one scale repeats bit for bit, so it is dense"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class State:
    """The quant_state of one weight."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    nested_block: int
    """0 without double quantization."""
    nested_offset: float


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every weight with a quant_state or an SCB. Raises InputError."""
    four = {name.partition(_STATE)[0]: name for name in stored.refs if _STATE in name}
    eight = [name.removesuffix("SCB") + "weight" for name in stored.refs if name.endswith(".SCB")]

    def either(name: str) -> Packed:
        return _four(stored, name, four[name]) if name in four else _eight(stored, name)

    for name in stored.refs:
        weight, _, part = name.rpartition(".")
        if part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map") and weight not in four:
            raise stored.bad(name, f"{weight}{_STATE}nf4 or fp4 beside it", "none", "fetch the checkpoint again")
    return stored.foreign(stored.gather([*four, *eight], either))


def _turn(stored: Stored, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """Stored shape of the dense weight, and whether it is transposed."""
    turned = stored.conv1d(name.rpartition(".")[0]) and len(shape) == 2
    return (shape[::-1] if turned else shape), turned


def _four(stored: Stored, name: str, json_name: str) -> Packed:
    state = _state(stored, json_name)
    count = math.prod(state.shape)
    blocks, size = -(-count // state.block), -(-count // 2)
    if name not in stored.refs:
        raise stored.bad(name, "a tensor of this name", "none", "fetch the checkpoint again")
    weight = stored.refs[name]
    if math.prod(weight.shape) * DTYPE_BYTES[weight.dtype] != size:
        raise stored.bad(name, f"{size} bytes for shape {list(state.shape)}", f"{weight.dtype} {list(weight.shape)}")
    parts = [name, json_name]
    parts.append(stored.ref(f"{name}.absmax", {"U8"} if state.nested_block else {"F32", "BF16", "F16"}, (blocks,)).name)
    if state.nested_block:
        parts.append(stored.ref(f"{name}.nested_absmax", {"F32"}, (-(-blocks // state.nested_block),)).name)
        parts.append(stored.ref(f"{name}.nested_quant_map", {"F32"}, (256,)).name)
    if f"{name}.quant_map" in stored.refs:
        parts.append(stored.ref(f"{name}.quant_map", {"F32"}, (16,)).name)
        _check_map(stored, f"{name}.quant_map", state.kind)
    dtype = stored.dtype or {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[state.dtype]
    shape, turned = _turn(stored, name, state.shape)
    whole = state.kind == "nf4" and len(shape) == 2 and not (turned or state.nested_block or shape[1] % state.block)
    if whole and torch_dtype(dtype) == state.dtype and stored.code_dtype(f"{name}.absmax") == (dtype, ""):
        scheme = Scheme.parse(f"nf4g{state.block}")
        kept = partial(_read_codes, name=name, shape=shape, scheme=scheme, dtype=state.dtype)
        return Packed(name, dtype, shape, scheme, tuple(parts), kept)
    read = partial(_read_four, name=name, state=state, dtype=torch_dtype(dtype), turned=turned)
    return Packed(name, dtype, shape, None, tuple(parts), read, _NOTE_NF4 if state.kind == "nf4" else _NOTE)


def _read_codes(reader: Reader, *, name: str, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> QTensor:
    pairs = reader(name).flatten().view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 0xF], dim=-1).reshape(shape)
    return QTensor(scheme, codes, reader(f"{name}.absmax").to(dtype).reshape(shape[0], -1))


def _state(stored: Stored, name: str) -> State:
    """The JSON of a weight, checked."""
    raw = stored.peek(stored.ref(name, {"U8"}).name)
    if raw is None:
        raise stored.bad(name, "the tensor on this machine: only it tells the weight's shape", "its header", "download it first")
    try:
        said = json.loads(bytes(raw.tolist()).decode("utf-8"))
        nested = said.get("nested_blocksize")
        state = State(
            said["quant_type"], tuple(said["shape"]), _DTYPES[said["dtype"]], said["blocksize"],
            nested or 0, float(said["nested_offset"]) if nested else 0.0,
        )  # fmt: skip
        whole = [*state.shape, state.block, state.nested_block]
        if not state.shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in whole) or 0 in state.shape:
            raise ValueError(f"shape {list(state.shape)}, blocks of {state.block} and {state.nested_block}")
        if nested and _DTYPES[said["nested_dtype"]] != torch.float32:
            raise ValueError(f"nested_dtype {said['nested_dtype']}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise stored.bad(name, "a quant_state in JSON", f"{type(error).__name__}: {error}") from None
    kind = name.partition(_STATE)[2]
    if state.kind != kind or kind not in _codes():
        raise stored.bad(name, "quant_type nf4 or fp4, the same as in its name", f"'{state.kind}'")
    if state.block not in _BLOCKS:
        raise stored.bad(name, f"a blocksize among {', '.join(map(str, _BLOCKS))}", str(state.block))
    return state


def _codes() -> dict[str, torch.Tensor]:
    fp4 = torch.tensor(_FP4)
    return {"nf4": torch.tensor(NF4), "fp4": fp4 / fp4.abs().max()}


def _check_map(stored: Stored, name: str, kind: str) -> None:
    """Raises InputError for another code book than bitsandbytes' own, which readers use without checking."""
    said = stored.peek(name)
    if said is not None and not torch.allclose(said, _codes()[kind], rtol=0, atol=1e-4):
        raise stored.bad(name, f"bitsandbytes' own code book of {kind}", str([round(v, 4) for v in said.tolist()]))


def _read_four(reader: Reader, *, name: str, state: State, dtype: torch.dtype, turned: bool) -> torch.Tensor:
    packed = reader(name).flatten().view(torch.uint8)
    absmax = reader(f"{name}.absmax")
    if state.nested_block:
        nested = reader(f"{name}.nested_absmax").repeat_interleave(state.nested_block)[: len(absmax)]
        absmax = reader(f"{name}.nested_quant_map")[absmax.int()] * nested + torch.tensor(state.nested_offset)
    absmax, code = absmax.float(), _codes()[state.kind]
    count = math.prod(state.shape)
    out = torch.empty(count, dtype=dtype)
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        pair = packed[start // 2 : -(-stop // 2)]
        values = code[torch.stack([pair >> 4, pair & 0xF], dim=-1).flatten().int()][: stop - start]
        scale = absmax[start // state.block : -(-stop // state.block)].repeat_interleave(state.block)[: stop - start]
        out[start:stop] = (values * scale).to(state.dtype).to(dtype)
    weight = out.reshape(state.shape)
    return weight.T.contiguous() if turned else weight


def _eight(stored: Stored, name: str) -> Packed:
    weight = stored.matrix(name, {"I8"})
    module = name.removesuffix("weight")
    scb = stored.ref(f"{module}SCB", {"F32", "F16", "BF16"}, (weight.shape[0],), (weight.shape[0], 1))
    parts, layout = [name, scb.name], f"{module}weight_format"
    if layout in stored.refs:
        parts.append(layout)
        said = stored.peek(layout)
        if said is not None and bool(said.any()):
            raise _old_layout(stored, layout, said)
    dtype = stored.dense_dtype()
    shape, turned = _turn(stored, name, weight.shape)
    read = partial(_read_eight, name=name, scb=scb.name, dtype=torch_dtype(dtype), turned=turned)
    return Packed(name, dtype, shape, None, tuple(parts), read, _NOTE_INT8)


def _old_layout(stored: Stored, name: str, said: torch.Tensor) -> InputError:
    return stored.bad(name, "0 (row by row)", f"{said.flatten().tolist()}: a layout of one GPU generation", "save it anew")


def _read_eight(reader: Reader, *, name: str, scb: str, dtype: torch.dtype, turned: bool) -> torch.Tensor:
    weight, scale = reader(name), reader(scb).float().reshape(-1, 1)
    out = by_rows(tuple(weight.shape), dtype, lambda rows: weight[rows] * scale[rows] * _INT8_STEP)
    return out.T.contiguous() if turned else out
