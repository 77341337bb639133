"""compressed-tensors checkpoints, as codes where a scheme has them.

By format, for a linear NAME [O, I] (`NAME.weight` is what it stands for):
    pack-quantized        weight_packed int32 [O, ceil(I b / 32)], codes u = q + 2^(b-1), a bit stream per row;
                          weight_scale; weight_shape int64 [2]; weight_zero_point int32 [ceil(O b / 32), groups] with
                          streams down the rows, offset as well, if asymmetric; weight_g_idx int32 [I] in old files
    int-quantized         weight int8 [O, I]; weight_scale; weight_zero_point int8 of the same shape, if asymmetric
    float-quantized       weight float8_e4m3fn [O, I]; weight_scale
    nvfp4-pack-quantized  weight_packed uint8 [O, I/2], the even column low; weight_scale float8_e4m3fn [O, I/16];
                          weight_global_scale fp32 [1], which divides the scale; input_global_scale fp32 [1], which
                          divides the scales of activations, if those are rounded
    mxfp4-pack-quantized  weight_packed uint8 [O, I/2]; weight_scale uint8 [O, I/32], 2^(u - 127)
    mxfp6-pack-quantized  weight_packed uint8 [O, 3 I/4], four E2M3 in three bytes; weight_scale as in mxfp4
    mxfp8-quantized       weight float8_e4m3fn [O, I]; weight_scale as in mxfp4
naive-quantized is int- or float-quantized, by its dtype; mixed-precision names a format per group. weight_scale is
[1], [O, 1], [O, I/g] or [O/h, I/w] for the strategies tensor, channel, group, block.

The reader (0.20's decompress) multiplies in the dtype of weight_scale, which transformers casts to the model's as it
loads: integers below 256 and their product with a 16-bit scale are exact in fp32, so QTensor's value, rounded
once to the weight's dtype, is the same. The mx formats are multiplied in bf16,
nvfp4 in fp32 and rounded to bf16; the result is then rounded to config.json's dtype.
Rounding of activations per token, or in blocks like those of FP4 weights, becomes part of the scheme. Other quantization of
activations, that of experts' inputs and of the KV cache is dropped, with a note.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from compress.checkpoint.reader import torch_dtype
from compress.importers.arguments import Arguments, Targets
from compress.importers.floats import E2M3, e8m0, pairs, spread
from compress.importers.packed import NOT_HERE, Foreign, Packed, Reader, Stored, joined
from compress.importers.words import IN_ORDER, Order, along_rows, by_rows, down_rows, expand, order_of, scheme_for
from compress.numerics import bitstream
from compress.numerics.bitstream import row_bytes
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import BLOCK, Scheme
from compress.spec.weight_state import FLOATS, Note

_COMPANIONS = tuple(f"{side}_{part}" for side in ("input", "output") for part in ("scale", "zero_point", "global_scale"))
_CACHE = frozenset(f"{which}_{part}" for which in "qkv" for part in ("scale", "zero_point", "global_scale"))
_SMALL = {"mxfp4-pack-quantized": (32, 2, 1), "mxfp6-pack-quantized": (32, 4, 3), "nvfp4-pack-quantized": (16, 2, 1)}
"""Columns per scale, and how many columns lie in how many bytes."""
_FLOAT_NOTE = "no scheme here has floats of {bits} bits in groups of {group}, so it is dense"
_FP8_NOTE = "no scheme here has FP8 with such blocks, or scales of such a dtype, so it is dense"
_NVFP4_NOTE = "its reader rounds to bfloat16 before it rounds to {dtype}, which no scheme does, so it is dense"
_NO_SCHEME = "no scheme here has integers of {bits} bits in groups of {group}, so it is dense"
_OUT_OF_ORDER = "its inputs belong to groups out of order (actorder), which no scheme has, so it is dense"


def decode(stored: Stored, config: dict[str, Any]) -> Foreign:
    """Every module with packed or scaled weights. Raises InputError."""
    targets = Targets.read(stored, config)
    packed = [name.removesuffix(".weight_packed") for name in stored.refs if name.endswith(".weight_packed")]
    plain = [name.removesuffix(".weight_scale") for name in stored.refs if name.endswith(".weight_scale")]
    modules = list(dict.fromkeys([*packed, *plain]))
    used: dict[str, Arguments] = {}

    def weight(module: str) -> Packed:
        used[module] = targets.of(stored, module)
        return _weight(stored, module, used[module])

    cache = [name for name in stored.refs if targets.caches and name.rpartition(".")[2] in _CACHE]
    # Scales of keys and values can stand alone, beside dense weights.
    weights = stored.gather(modules, weight) if modules or not cache else {}
    dropped, notes = [], []
    held = {part for packed in weights.values() for part in packed.parts}
    scales = [n for module in modules for part in _COMPANIONS if (n := f"{module}.{part}") in stored.refs and n not in held]
    for names, what in ((scales, "scales of activations"), (cache, "scales of the KV cache")):
        dropped += names
        if names:
            notes.append(Note("dropped", f"{what}: the weights are read alone", tuple(names)))
    loud = {name for name, packed in weights.items() if packed.scheme is not None and packed.scheme.inputs}
    if quiet := tuple(name for module, args in used.items() if args.activations and (name := f"{module}.weight") not in loud):
        notes.append(Note("dropped", "quantization of activations: the weights are read alone", quiet))
    return stored.foreign(weights, dropped, notes)


def _weight(stored: Stored, module: str, args: Arguments) -> Packed:
    kind = args.format
    if kind in ("naive-quantized", "int-quantized", "float-quantized", "mxfp8-quantized"):
        weight = stored.matrix(f"{module}.weight", {"I8", "F8_E4M3"})
        if weight.dtype == "I8":
            if kind not in ("naive-quantized", "int-quantized"):
                raise stored.bad(weight.name, f"float8_e4m3fn, by {kind}", "int8")
            return _integers(stored, module, args, weight.shape)
        if kind == "int-quantized":
            raise stored.bad(weight.name, "int8, by int-quantized", "float8_e4m3fn")
        return _mxfp8(stored, module, args) if kind == "mxfp8-quantized" else _fp8(stored, module, args)
    if kind == "pack-quantized":
        return _packed_integers(stored, module, args)
    return _small(stored, module, args)


def _packed_integers(stored: Stored, module: str, args: Arguments) -> Packed:
    packed = stored.matrix(f"{module}.weight_packed", {"I32"})
    rows, words = packed.shape
    shape = stored.ref(f"{module}.weight_shape", {"I64", "I32"}, (2,))
    said = stored.peek(shape.name)
    columns = (words * 32 // args.bits) if said is None else int(said[1])
    if said is not None and int(said[0]) != rows:
        raise stored.bad(shape.name, f"{rows} rows, as in weight_packed", str(said.tolist()))
    stored.ref(packed.name, {"I32"}, (rows, row_bytes(columns, args.bits) // 4))
    return _integers(stored, module, args, (rows, columns), [packed.name, shape.name], "" if said is not None else NOT_HERE)


def _integers(
    stored: Stored, module: str, args: Arguments, shape: tuple[int, ...], packed: list[str] | None = None, note: str = ""
) -> Packed:
    """A weight of integer codes, packed in words or one in each byte."""
    if not args.integer:
        raise stored.bad_config(f"type int for {module}, whose format is {args.format}", "float")
    rows, columns = shape
    group, grid = args.grid(stored, module, rows, columns)
    scale = stored.ref(f"{module}.weight_scale", FLOATS, *grid)
    parts = [*(packed or [f"{module}.weight"]), scale.name]
    zeros_packed = False
    if not args.symmetric:
        zeros_packed = packed is not None and args.strategy in ("group", "channel")
        streams = [(row_bytes(rows, args.bits) // 4, scale.shape[-1])]
        dtypes = {"I32"} if zeros_packed else {"I8", "I16", "I32", "I64"}
        parts.append(stored.ref(f"{module}.weight_zero_point", dtypes, *(streams if zeros_packed else [scale.shape])).name)
    parts += _empty_zeros(stored, module) if args.symmetric else []
    order = IN_ORDER
    if f"{module}.weight_g_idx" in stored.refs:
        parts.append(stored.ref(f"{module}.weight_g_idx", {"I32", "I64"}, (columns,)).name)
        order, order_note = _order(stored, parts[-1], group or columns, columns)
        note = joined(note, order_note)
    dtype, dtype_note = stored.code_dtype(scale.name)
    scheme = _with_inputs(scheme_for(args.bits, group, args.symmetric), module, args)
    if scheme is None:
        note = joined(note, _NO_SCHEME.format(bits=args.bits, group=group or "a row"))
    if order.scattered:
        scheme, note = None, joined(note, _OUT_OF_ORDER)
    read = partial(_read_integers, module=module, args=args, shape=(rows, columns), packed=packed is not None, group=group,
                   zeros_packed=zeros_packed, order=order, scheme=scheme, dtype=dtype)  # fmt: skip
    return Packed(f"{module}.weight", dtype, (rows, columns), scheme, tuple(parts), read, joined(note, dtype_note))


def _empty_zeros(stored: Stored, module: str) -> list[str]:
    """Zero points that old versions stored for symmetric weights. Raises InputError unless they are zeros."""
    name = f"{module}.weight_zero_point"
    said = stored.peek(name) if name in stored.refs else None
    if said is not None and bool(said.float().any()):
        raise stored.bad(name, "zeros, by a symmetric config", "others")
    return [name] if name in stored.refs else []


def _order(stored: Stored, name: str, group: int, columns: int) -> tuple[Order, str]:
    """The group of each input, and a note."""
    index = stored.peek(name)
    if index is None:
        return Order(scattered=True), NOT_HERE
    # The old reader took an index with a -1 anywhere for one that was never filled.
    if int(index.min()) == -1:
        return IN_ORDER, ""
    return order_of(stored, name, index, group, -(-columns // group)), ""


def _read_integers(
    reader: Reader, *, module: str, args: Arguments, shape: tuple[int, int], packed: bool, group: int | None,
    zeros_packed: bool, order: Order, scheme: Scheme | None, dtype: str,
) -> QTensor | torch.Tensor:  # fmt: skip
    rows, columns = shape
    middle = 1 << (args.bits - 1)
    if packed:
        codes = along_rows(reader(f"{module}.weight_packed"), args.bits, columns)
    else:
        codes = _unsigned(reader(f"{module}.weight"), args, f"{module}.weight")
    scale, zero = _spread(reader(f"{module}.weight_scale"), args, rows), None
    if not args.symmetric:
        stored = reader(f"{module}.weight_zero_point")
        zero = down_rows(stored, args.bits, rows).T if zeros_packed else _unsigned(stored, args, f"{module}.weight_zero_point")
        zero = _spread(zero, args, rows)
    if order.runs is not None:
        scale, zero = scale[:, order.runs], None if zero is None else zero[:, order.runs]
    kind = torch_dtype(dtype)
    if scheme is not None:
        return QTensor(scheme, codes, scale.to(kind).contiguous(), None if zero is None else zero.contiguous())
    index = reader(f"{module}.weight_g_idx").to(torch.int64) if order.scattered else torch.arange(columns) // (group or columns)
    return expand(codes, scale.to(kind), middle if zero is None else zero, index, kind)


def _unsigned(signed: torch.Tensor, args: Arguments, name: str) -> torch.Tensor:
    """uint8 codes from signed ones. Raises InputError for a number outside of the bits."""
    middle = 1 << (args.bits - 1)
    low, high = int(signed.min()), int(signed.max())
    if low < -middle or high >= middle:
        raise args.bad(name, f"whole numbers of {args.bits} bits, {-middle} to {middle - 1}", f"{low} to {high}")
    # In bytes the addition wraps to the right code.
    return signed.to(torch.int8).view(torch.uint8) + middle


def _with_inputs(scheme: Scheme | None, module: str, args: Arguments) -> Scheme | None:
    """The scheme with the rounding of activations; without it for experts, which transformers fuses."""
    return scheme if scheme is None or ".experts." in module else replace(scheme, inputs=args.inputs)


def _spread(scale: torch.Tensor, args: Arguments, rows: int) -> torch.Tensor:
    """Scales or zero points of any strategy, expanded to [rows, groups]."""
    if args.strategy == "tensor":
        return scale.reshape(1, 1).expand(rows, 1)
    if args.strategy == "block":
        return scale.repeat_interleave(args.block[0], dim=0)[:rows]
    return scale.reshape(rows, -1)


def _fp8(stored: Stored, module: str, args: Arguments) -> Packed:
    weight = stored.refs[f"{module}.weight"]
    if args.integer or not args.symmetric:
        raise stored.bad_config(f"symmetric floats for {module}, whose weight is float8", "integers or zero points")
    rows, columns = weight.shape
    group, grid = args.grid(stored, module, rows, columns)
    scale = stored.ref(f"{module}.weight_scale", FLOATS, *grid)
    dtype = stored.dense_dtype(scale.dtype)
    width = group or columns
    known = {("tensor", (0, 0)): "fp8-tensor", ("channel", (0, 0)): "fp8", ("block", (BLOCK, BLOCK)): "fp8-block"}
    text = known.get((args.strategy, args.block))
    # With scales of another dtype the product would be rounded to another dtype than the weight's.
    scheme = Scheme.parse(text) if text and scale.dtype in (dtype, "F32") else None
    scheme = _with_inputs(scheme, module, args)

    def read(reader: Reader) -> torch.Tensor | QTensor:
        if scheme is not None:
            s = reader(scale.name).float().reshape(scheme.grid_shape(rows, columns))
            return QTensor(scheme, reader(weight.name).view(torch.uint8), s)
        values, s = reader(weight.name), _spread(reader(scale.name), args, rows)

        def piece(part: slice) -> torch.Tensor:
            product = values[part].float() * spread(s[part].float(), (1, width), part.stop - part.start, columns)
            return product.to(s.dtype)

        return by_rows((rows, columns), torch_dtype(dtype), piece)

    note = "" if scheme is not None else _FP8_NOTE
    parts = (weight.name, scale.name, *_empty_zeros(stored, module))
    return Packed(weight.name, dtype, (rows, columns), scheme, parts, read, note)


def _mxfp8(stored: Stored, module: str, args: Arguments) -> Packed:
    weight = stored.refs[f"{module}.weight"]
    rows, columns = weight.shape
    if args.integer or columns % 32 or args.group not in (None, 32):
        raise stored.bad(weight.name, "float groups of 32 that divide the columns", f"{columns} in groups of {args.group}")
    scale = stored.ref(f"{module}.weight_scale", {"U8", "F8_E8M0"}, (rows, columns // 32))
    dtype = stored.dense_dtype()

    def read(reader: Reader) -> torch.Tensor:
        values, s = reader(weight.name), reader(scale.name)

        def piece(part: slice) -> torch.Tensor:
            by_group = spread(e8m0(s[part]), (1, 32), part.stop - part.start, columns)
            return (values[part].float() * by_group).to(torch.bfloat16)

        return by_rows((rows, columns), torch_dtype(dtype), piece)

    note = _FLOAT_NOTE.format(bits=8, group=32)
    return Packed(weight.name, dtype, (rows, columns), None, (weight.name, scale.name), read, note)


def _small(stored: Stored, module: str, args: Arguments) -> Packed:
    """Floats of 4 and 6 bits."""
    width, values, size = _SMALL[args.format]
    packed = stored.matrix(f"{module}.weight_packed", {"U8"})
    rows, columns = packed.shape[0], packed.shape[1] * values // size
    nvidia = args.format.startswith("nvfp4")
    if columns % width or args.integer or args.group not in (None, width):
        raise stored.bad(packed.name, f"float groups of {width} that divide the columns", f"{columns} in groups of {args.group}")
    dtypes = {"F8_E4M3"} if nvidia else {"U8", "F8_E8M0"}
    scale = stored.ref(f"{module}.weight_scale", dtypes, (rows, columns // width))
    parts = [packed.name, scale.name]
    if nvidia:
        parts.append(stored.ref(f"{module}.weight_global_scale", {"F32"}, (1,)).name)
    dtype = stored.dense_dtype()
    note = _FLOAT_NOTE.format(bits=args.bits, group=width)
    if args.bits == 4 and (dtype == "BF16" or not nvidia):
        scheme, number = _with_inputs(Scheme.parse("nvfp4" if nvidia else "mxfp4"), module, args), f"{module}.input_global_scale"
        assert scheme is not None
        if scheme.input_divisor and number in stored.refs:
            parts.append(stored.ref(number, {"F32"}, (1,)).name)
        elif scheme.input_divisor:
            scheme = replace(scheme, inputs="")
        kept = partial(_read_codes, parts=tuple(parts), columns=columns, scheme=scheme)
        return Packed(f"{module}.weight", dtype, (rows, columns), scheme, tuple(parts), kept)
    note = _NVFP4_NOTE.format(dtype=dtype) if nvidia else note
    read = partial(_read_small, parts=tuple(parts), shape=(rows, columns), kind=args.format, dtype=torch_dtype(dtype))
    return Packed(f"{module}.weight", dtype, (rows, columns), None, tuple(parts), read, note)


def _read_codes(reader: Reader, *, parts: tuple[str, ...], columns: int, scheme: Scheme) -> QTensor:
    codes, scale = bitstream.unpack(reader(parts[0]), 4, columns), reader(parts[1])
    if len(parts) > 2:
        of_inputs = reader(parts[3]).view(()) if scheme.input_divisor else None
        return QTensor(scheme, codes, scale, None, reader(parts[2]).view(()), input_scale=of_inputs)
    return QTensor(scheme, codes, scale.view(torch.uint8))


def _read_small(reader: Reader, *, parts: tuple[str, ...], shape: tuple[int, int], kind: str, dtype: torch.dtype) -> torch.Tensor:
    packed, scale = reader(parts[0]), reader(parts[1])
    s = scale.float() / reader(parts[2]) if len(parts) == 3 else e8m0(scale)
    six = torch.tensor(E2M3)

    def piece(rows: slice) -> torch.Tensor:
        if kind.startswith("mxfp6"):
            whole = packed[rows].to(torch.int32).unflatten(-1, (-1, 3))
            word = whole[..., 0] | whole[..., 1] << 8 | whole[..., 2] << 16
            values = six[torch.stack([word >> at & 0x3F for at in (0, 6, 12, 18)], dim=-1).flatten(-2)]
        else:
            values = pairs(packed[rows])
        grouped = values.unflatten(-1, (s.shape[1], -1)) * s[rows].unsqueeze(-1)
        rounded: torch.Tensor = grouped.flatten(-2).to(torch.bfloat16)
        return rounded

    return by_rows(shape, dtype, piece)
