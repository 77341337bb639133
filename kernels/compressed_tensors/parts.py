"""The tensors of each scheme in a compressed-tensors artifact.

A linear `NAME.weight` [out, in] becomes, depending on the format of its scheme,
    pack-quantized        integers, activations in 16 bits, FP8 or int4
        NAME.weight_packed      int32 [out, ceil(in * b / 32)]   codes u = q + 2^(b-1), one bit stream per row
        NAME.weight_scale       model dtype [out, groups]        [out, 1] per channel
        NAME.weight_shape       int64 [2]
        NAME.weight_zero_point  int32 [ceil(out * b / 32), groups]   asymmetric only; streams run down the rows
    int-quantized         integers with activations in int8
        NAME.weight             int8 [out, in]                   q, whatever its bits
        NAME.weight_scale       as above
    float-quantized       FP8 E4M3
        NAME.weight             float8_e4m3fn [out, in]
        NAME.weight_scale       model dtype [out, 1], [1] for the matrix, [ceil(out / 128), ceil(in / 128)] for blocks
    nvfp4-pack-quantized
        NAME.weight_packed      uint8 [out, in / 2]              the even column in the low nibble
        NAME.weight_scale       float8_e4m3fn [out, in / 16]
        NAME.weight_global_scale  fp32 [1]                       divides weight_scale
        NAME.input_global_scale   fp32 [1]                       divides the scales of activations, if those are nvfp4
    mxfp4-pack-quantized
        NAME.weight_packed      uint8 [out, in / 2]
        NAME.weight_scale       uint8 [out, in / 32]             E8M0
Streams, nibbles and the bytes of scales are those of the canonical form, so they are copied and nothing is rounded again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compress.errors import FormatError
from compress.spec.scheme import BLOCK, Scheme
from compress.spec.weight_state import TensorSpec, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


_BITS = (2, 3, 4, 8)
"""Widths of integers whose streams readers were run with."""


def kind_of(scheme: Scheme) -> str:
    """The name of the format that holds a scheme, empty if none does."""
    if scheme.minimum or (scheme.integer and scheme.bits not in _BITS):
        return ""
    if scheme.integer:
        return "int-quantized" if scheme.inputs.startswith("int8") else "pack-quantized"
    if scheme.grid == "e4m3":
        return "float-quantized"
    return {"e8m0": "mxfp4-pack-quantized", "e4m3": "nvfp4-pack-quantized"}.get(scheme.scales, "")


def specs(weight: Weight, scheme: Scheme) -> list[TensorSpec]:
    """The tensors of a weight, in order."""
    parts = _parts_of(weight.dtype, weight.rows, weight.columns, scheme)
    found = [TensorSpec(f"{weight.name}{end}", dtype, shape) for end, (dtype, shape) in parts.items()]
    return [*found, TensorSpec(_input_scale(weight.name), "F32", (1,))] if scheme.input_divisor else found


@lru_cache(maxsize=1024)
def _parts_of(dtype: str, rows: int, columns: int, scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """safetensors dtype and shape of each tensor, by the end of its name, of the many weights that are alike."""
    kind, scales = kind_of(scheme), scheme.grid_shape(rows, columns)
    if kind == "pack-quantized":
        packed, shape = ("I32", (rows, _words(columns, scheme))), ("I64", (2,))
        found = {"_packed": packed, "_scale": (dtype, scales), "_shape": shape}
        zeros = {"_zero_point": ("I32", (_words(rows, scheme), scales[1]))}
        return found if scheme.symmetric else found | zeros
    if kind in ("int-quantized", "float-quantized"):
        codes = "I8" if scheme.integer else "F8_E4M3"
        return {"": (codes, (rows, columns)), "_scale": (dtype, (1,) if scheme.scales == "tensor" else scales)}
    found = {"_packed": ("U8", (rows, columns // 2))}
    if kind == "mxfp4-pack-quantized":
        return found | {"_scale": ("U8", scales)}
    return found | {"_scale": ("F8_E4M3", scales), "_global_scale": ("F32", (1,))}


def copies(weight: Weight, scheme: Scheme) -> dict[str, str]:
    """Tensors with the same bytes as canonical ones."""
    name, kind = weight.name, kind_of(scheme)
    codes, scale = f"{name}.codes", f"{name}.scale"
    if kind == "int-quantized":
        return {f"{name}_scale": scale}
    if kind == "float-quantized":
        # The canonical form pads rows to whole words.
        return {} if weight.columns % 4 else {name: codes}
    found = {f"{name}_packed": codes, f"{name}_scale": scale}
    if kind == "nvfp4-pack-quantized":
        found[f"{name}_global_scale"] = f"{name}.tensor_scale"
    return {**found, _input_scale(name): f"{name}.input_scale"} if scheme.input_divisor else found


def constants(weight: Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Tensors that do not depend on the values."""
    import torch

    if kind_of(scheme) != "pack-quantized":
        return {}
    return {f"{weight.name}_shape": torch.tensor([weight.rows, weight.columns], dtype=torch.int64)}


def encode(weight: Weight, q: QTensor) -> dict[str, torch.Tensor]:
    """The tensors of `specs`. Raises FormatError for scales that the dtype of the model cannot hold."""
    import torch

    from compress.numerics import bitstream

    name, scheme, kind = weight.name, q.scheme, kind_of(q.scheme)
    if kind == "int-quantized":
        # In bytes the subtraction wraps to the right code.
        return {name: (q.codes - scheme.middle).view(torch.int8), f"{name}_scale": q.scale}
    if kind == "float-quantized":
        scale = _in_dtype(weight, q.scale)
        return {name: q.codes.view(torch.float8_e4m3fn), f"{name}_scale": scale.view(1) if scheme.scales == "tensor" else scale}
    stream = bitstream.pack(q.codes, scheme.bits)
    if kind != "pack-quantized":
        found = {f"{name}_packed": stream, f"{name}_scale": q.scale}
        if q.tensor_scale is not None:
            found[f"{name}_global_scale"] = q.tensor_scale.view(1)
        if scheme.input_divisor:
            found[_input_scale(name)] = torch.ones(1) if q.input_scale is None else q.input_scale.view(1)
        return found
    tensors = {f"{name}_packed": stream.view(torch.int32), f"{name}_scale": q.scale, **constants(weight, scheme)}
    if q.zero is not None:
        # Cloned: the transpose of a single group counts as contiguous, but its strides prevent the view as words.
        down = bitstream.pack(q.zero.T.clone(memory_format=torch.contiguous_format), scheme.bits).view(torch.int32)
        tensors[f"{name}_zero_point"] = down.T.contiguous()
    return tensors


def decode(weight: Weight, scheme: Scheme, tensors: dict[str, torch.Tensor]) -> QTensor:
    """The inverse of `encode`."""
    import torch

    from compress.numerics import bitstream
    from compress.numerics.qtensor import QTensor

    name, kind, bits = weight.name, kind_of(scheme), scheme.bits
    scale = tensors[f"{name}_scale"]
    if kind == "int-quantized":
        return QTensor(scheme, tensors[name].view(torch.uint8) + scheme.middle, scale)
    if kind == "float-quantized":
        scale = scale.float().view(scheme.grid_shape(weight.rows, weight.columns))
        return QTensor(scheme, tensors[name].view(torch.uint8), scale)
    codes = bitstream.unpack(tensors[f"{name}_packed"].view(torch.uint8), bits, weight.columns)
    if kind != "pack-quantized":
        numbers = (tensors.get(f"{name}_global_scale"), tensors.get(_input_scale(name)))
        whole, of_inputs = (None if number is None else number.view(()) for number in numbers)
        return QTensor(scheme, codes, scale, None, whole, input_scale=of_inputs)
    zero = None
    if not scheme.symmetric:
        down = tensors[f"{name}_zero_point"].T.contiguous().view(torch.uint8)
        zero = bitstream.unpack(down, bits, weight.rows).T.contiguous()
    return QTensor(scheme, codes, scale, zero)


def group_of(scheme: Scheme) -> dict[str, Any]:
    """The group of config_groups for a scheme, without its targets."""
    kind, type_ = kind_of(scheme), "int" if scheme.integer else "float"
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": type_, "symmetric": scheme.symmetric}
    if scheme.scales == "block":
        weights |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    elif kind == "nvfp4-pack-quantized":
        weights |= {"strategy": "tensor_group", "group_size": scheme.group, "scale_dtype": "torch.float8_e4m3fn"}
    elif kind == "mxfp4-pack-quantized":
        weights |= {"strategy": "group", "group_size": scheme.group, "scale_dtype": "torch.uint8"}
    elif scheme.group:
        weights |= {"strategy": "group", "group_size": scheme.group}
    else:
        weights |= {"strategy": "tensor" if scheme.scales == "tensor" else "channel"}
    inputs = _inputs(scheme, weights) if scheme.inputs else None
    return {"format": kind, "weights": {**weights, "dynamic": False}, "input_activations": inputs, "output_activations": None}


def _inputs(scheme: Scheme, weights: dict[str, Any]) -> dict[str, Any]:
    """input_activations for a scheme whose weights are described by `weights`."""
    if scheme.inputs in ("mxfp4", "nvfp4"):
        # `local`: scales of blocks are found as the model runs, what divides them is stored.
        return {**weights, "dynamic": "local" if scheme.input_divisor else True}
    blocks = {"strategy": "group", "group_size": BLOCK} if scheme.scales == "block" else {"strategy": "token"}
    kind = "float" if scheme.inputs == "fp8" else "int"
    return {
        "num_bits": scheme.input_bits, "type": kind, "symmetric": not scheme.inputs.endswith("-asym"), **blocks, "dynamic": True
    }  # fmt: skip


def cache_scheme(scale: Weight) -> dict[str, Any]:
    """kv_cache_scheme for a scale of keys or values: FP8, with one for all heads or one for each."""
    strategy = "tensor" if scale.shape == (1,) else "attn_head"
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}


def _input_scale(name: str) -> str:
    """The tensor that divides the scales of a weight's inputs."""
    return f"{name.removesuffix('weight')}input_global_scale"


def _words(values: int, scheme: Scheme) -> int:
    return -(-values * scheme.bits // 32)


def _in_dtype(weight: Weight, scale: torch.Tensor) -> torch.Tensor:
    """Scales in the dtype that the reader casts them to. Raises FormatError if that would change one."""
    from compress.checkpoint.reader import torch_dtype

    cast = scale.to(torch_dtype(weight.dtype))
    if lost := int((cast.float() != scale).sum()):
        raise FormatError(
            f"'{weight.name}'", f"scales that {weight.dtype} can hold, in which the reader multiplies",
            f"{lost} of {scale.numel()} that it cannot", "unpack with to=dense and quantize again",
        )  # fmt: skip
    return cast
