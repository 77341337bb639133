"""MLX checkpoints: what mlx-lm writes is kept in codes, and what is not read here says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import InputError
from compress.importers import method_of, open_foreign
from compress.numerics import bitstream

NAME = "model.layers.0.mlp.up_proj"


def affine(bits: int, group: int, rows: int = 16, columns: int = 128) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The three tensors of random codes, and what they mean."""
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale, bias = (torch.randn(rows, columns // group).half() for _ in range(2))
    dense = codes.float() * scale.float().repeat_interleave(group, 1) + bias.float().repeat_interleave(group, 1)
    words = bitstream.pack(codes, bits).view(torch.uint32)
    return {f"{NAME}.weight": words, f"{NAME}.scales": scale, f"{NAME}.biases": bias}, dense


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_affine_codes_are_kept(store: Any, dense: Any, bits: int, group: int, key: str) -> None:
    tensors, meant = affine(bits, group)
    config = {"model_type": "llama", "dtype": "float16", key: {"group_size": group, "bits": bits}}
    checkpoint = store(tensors, None, beside={"config.json": config})
    assert method_of(checkpoint) == "mlx"
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == f"w{bits}a16g{group}-min"
    assert torch.equal(dense(checkpoint, packed), meant.half())


def test_settings_of_a_module_count_before_those_of_the_model(store: Any) -> None:
    tensors, _ = affine(5, 64)
    said = {"group_size": 32, "bits": 4, "mode": "affine", NAME: {"group_size": 64, "bits": 5}, "lm_head": False}
    packed = open_foreign(store(tensors, said)).weights[f"{NAME}.weight"]
    assert (str(packed.scheme), packed.shape, packed.dtype) == ("w5a16g64-min", (16, 128), "F16")


def test_codes_balanced_about_zero_are_symmetric(store: Any, dense: Any) -> None:
    tensors, _ = affine(4, 32)
    tensors[f"{NAME}.biases"] = tensors[f"{NAME}.scales"] * -8
    checkpoint = store(tensors, {"group_size": 32, "bits": 4})
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == "w4a16g32"
    scale = tensors[f"{NAME}.scales"].float().repeat_interleave(32, 1)
    codes = bitstream.unpack(tensors[f"{NAME}.weight"].view(torch.uint8), 4, 128).float()
    assert torch.equal(dense(checkpoint, packed), ((codes - 8) * scale).half())


def test_mxfp4_is_kept(store: Any, dense: Any) -> None:
    codes, scales = torch.randint(0, 16, (16, 128), dtype=torch.uint8), torch.randint(120, 130, (16, 4), dtype=torch.uint8)
    tensors = {f"{NAME}.weight": bitstream.pack(codes, 4).view(torch.uint32), f"{NAME}.scales": scales}
    checkpoint = store(tensors, {"group_size": 32, "bits": 4, "mode": "mxfp4"}, dtype="bfloat16")
    packed = open_foreign(checkpoint).weights[f"{NAME}.weight"]
    assert str(packed.scheme) == "mxfp4"
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])[codes.long()] * torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(dense(checkpoint, packed), values.bfloat16())


@pytest.mark.parametrize(
    ("said", "changed", "message"),
    [
        ({"group_size": 32, "bits": 7}, {}, "bits among 2, 3, 4, 5, 6, 8 for model.layers.0.mlp.up_proj"),
        ({"group_size": 16, "bits": 4}, {}, "group_size 32, 64 or 128"),
        ({"group_size": 32, "bits": 4, "mode": "nvfp4"}, {}, "mode affine or mxfp4"),
        ({"group_size": 32, "bits": 3}, {}, "rows of 3-bit codes in groups of 32"),
        ({"group_size": 64, "bits": 4}, {}, r"shape \[16, 2\] by config.json"),
        ({"group_size": 32, "bits": 4}, {f"{NAME}.biases": None}, "a tensor of this name"),
        ({"group_size": 32, "bits": 4}, {f"{NAME}.biases": torch.zeros(16, 4)}, "dtype F16"),
        ({"group_size": 32, "bits": 4}, {f"{NAME}.weight": torch.zeros(4, 16, 16).to(torch.uint32)}, "experts in one tensor"),
        ({"group_size": 32, "bits": 4}, {f"{NAME}.weight": torch.zeros(16, 16)}, "dtype U32"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_told(store: Any, said: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    tensors, _ = affine(4, 32)
    tensors = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        open_foreign(store(tensors, said))
