"""Fine-grained FP8 and MXFP4 against transformers' own loaders' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import InputError
from compress.importers import open_foreign

NAME = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def fp8(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)


def reader(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)


def slow(weight: torch.Tensor, scale: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """DeepSeek's weight_dequant, element by element of the scale's grid."""
    out = torch.empty(weight.shape, dtype=dtype)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            rows, columns = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
            out[rows, columns] = (weight[rows, columns].float() * scale[r, c]).to(dtype)
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp8_blocks_that_divide(store: Any, dense: Any, dtype: str) -> None:
    weight, scale = fp8(256, 384), torch.rand(2, 3) * 0.01
    checkpoint = store({NAME: weight, f"{NAME}_scale_inv": scale}, FP8, dtype=dtype)
    packed = open_foreign(checkpoint).weights[NAME]
    assert str(packed.scheme) == "fp8-block"
    assert torch.equal(dense(checkpoint, packed), reader(weight, scale, getattr(torch, dtype)))
    assert torch.equal(dense(checkpoint, packed), slow(weight, scale, 128, getattr(torch, dtype)))


def test_fp8_blocks_that_are_cut_short(store: Any, dense: Any) -> None:
    weight, scale = fp8(200, 130), torch.rand(2, 2) * 0.01
    checkpoint = store({NAME: weight, f"{NAME}_scale_inv": scale}, FP8, dtype="bfloat16")
    assert torch.equal(dense(checkpoint, open_foreign(checkpoint).weights[NAME]), slow(weight, scale, 128, torch.bfloat16))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_per_tensor(store: Any, dense: Any, shape: tuple[int, ...]) -> None:
    weight, scale = fp8(64, 96), torch.full(shape, 0.0123)
    tensors = {NAME: weight, f"{NAME}_scale_inv": scale, NAME.replace("weight", "activation_scale"): torch.ones(())}
    checkpoint = store(tensors, {**FP8, "weight_block_size": None}, dtype="bfloat16")
    foreign = open_foreign(checkpoint)
    assert torch.equal(dense(checkpoint, foreign.weights[NAME]), (weight.float() * 0.0123).bfloat16())
    assert foreign.parts == set(tensors)
    assert foreign.notes[-1].what == "dropped"


@pytest.mark.parametrize("kind", ["bytes", "e8m0"])
def test_fp8_with_scales_of_powers(store: Any, dense: Any, kind: str) -> None:
    weight, exponents = fp8(256, 256), torch.tensor([[120, 0], [127, 130]], dtype=torch.uint8)
    scale = exponents if kind == "bytes" else exponents.view(torch.float8_e8m0fnu)
    checkpoint = store({NAME: weight, f"{NAME}_scale_inv": scale}, FP8, dtype="bfloat16")
    assert torch.equal(dense(checkpoint, open_foreign(checkpoint).weights[NAME]), reader(weight, scale, torch.bfloat16))


def test_fp8_fused_experts_and_fp4_experts(store: Any, dense: Any) -> None:
    weight, scale = fp8(3, 256, 128), torch.rand(3, 2, 1)
    four = torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    small = torch.randint(118, 130, (64, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {
        "mlp.experts.gate_up_proj": weight,
        "mlp.experts.gate_up_proj_scale_inv": scale,
        "mlp.experts.0.w1.weight": four,
        "mlp.experts.0.w1.scale": small,
    }
    checkpoint = store(tensors, {**FP8, "expert_dtype": "fp4"}, dtype="bfloat16")
    foreign = open_foreign(checkpoint)
    assert torch.equal(dense(checkpoint, foreign.weights["mlp.experts.gate_up_proj"]), reader(weight, scale, torch.bfloat16))
    assert foreign.weights["mlp.experts.gate_up_proj"].scheme is None
    packed = foreign.weights["mlp.experts.0.w1.weight"]
    assert packed.shape == (64, 64)
    assert str(packed.scheme) == "mxfp4"
    assert torch.equal(dense(checkpoint, packed), reader(four, small, torch.bfloat16))
    assert foreign.parts == set(tensors)


def test_fp8_without_a_dtype_takes_that_of_the_scales(store: Any, dense: Any) -> None:
    weight, scale = fp8(128, 128), torch.rand(1, 1)
    checkpoint = store({NAME: weight, f"{NAME}_scale_inv": scale}, FP8, dtype=None)
    packed = open_foreign(checkpoint).weights[NAME]
    assert packed.dtype == "F32"
    assert torch.equal(dense(checkpoint, packed), weight.float() * scale)


@pytest.mark.parametrize(
    ("scale", "change", "said"),
    [
        (None, {}, "scale_inv"),
        (torch.ones(3, 3), {}, "grid of blocks"),
        (torch.ones(2), {}, "grid of blocks"),
        (torch.ones(2, 2, dtype=torch.int32), {}, "dtype"),
        (torch.ones(2, 2), {"weight_block_size": [0, 128]}, "weight_block_size"),
        (torch.ones(2, 2), {"weight_block_size": 128}, "weight_block_size"),
    ],
)
def test_fp8_bad_input(store: Any, scale: torch.Tensor | None, change: dict[str, Any], said: str) -> None:
    tensors = {NAME: fp8(256, 256), **({} if scale is None else {f"{NAME}_scale_inv": scale})}
    with pytest.raises(InputError, match=said):
        open_foreign(store(tensors, {**FP8, **change}))


EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_mxfp4_as_transformers_loads_it(store: Any, dense: Any, dtype: str) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 48, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 48, 2), dtype=torch.uint8, generator=generator)
    tensors = {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}
    checkpoint = store(tensors, {"quant_method": "mxfp4"}, dtype=dtype)
    foreign = open_foreign(checkpoint)
    packed = foreign.weights[EXPERTS]
    assert packed.shape == (3, 64, 48)
    assert str(packed.scheme) == "mxfp4"
    read = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))
    assert torch.equal(dense(checkpoint, packed), read)
    assert foreign.parts == set(tensors)


def test_every_code_and_every_scale_of_mxfp4(store: Any, dense: Any) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(1, 1, 16)
    checkpoint = store({f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}, {"quant_method": "mxfp4"}, dtype=None)
    ours = dense(checkpoint, open_foreign(checkpoint).weights[EXPERTS])
    read = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    # The last scale means NaN, of which the reader makes infinities.
    assert torch.equal(ours[..., :255], read[..., :255])
    assert torch.equal(ours[..., :255].signbit(), read[..., :255].signbit())
    assert bool(ours[..., 255].isnan().all())


def test_mxfp4_bad_input(store: Any) -> None:
    blocks, scales = torch.zeros(2, 8, 2, 16, dtype=torch.uint8), torch.zeros(2, 8, 2, dtype=torch.uint8)
    for tensors, said in (
        ({f"{EXPERTS}_blocks": blocks}, "tensor of this name"),
        ({f"{EXPERTS}_scales": scales}, "blocks beside"),
        ({f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales[:, :4]}, "shape"),
        ({f"{EXPERTS}_blocks": blocks[..., :8], f"{EXPERTS}_scales": scales}, "shape"),
        ({}, "none among"),
    ):
        with pytest.raises(InputError, match=said):
            open_foreign(store(tensors, {"quant_method": "mxfp4"}))
