"""A factory of small checkpoints of other tools: tensors, a tiny config.json, and what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.reader import Checkpoint, open_checkpoint

Store = Callable[..., Checkpoint]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    def write(
        tensors: dict[str, torch.Tensor],
        quantization: dict[str, Any] | None,
        dtype: str | None = "float16",
        beside: dict[str, dict[str, Any]] | None = None,
        **config: Any,
    ) -> Checkpoint:
        directory = tmp_path / f"checkpoint{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        plain = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
        save_file({name: t.contiguous().clone() for name, t in {**plain, **tensors}.items()}, directory / "model.safetensors")
        config = {"model_type": "llama", **({"dtype": dtype} if dtype else {}), **config}
        if quantization is not None:
            config["quantization_config"] = quantization
        (directory / "config.json").write_text(json.dumps(config))
        for file, content in (beside or {}).items():
            (directory / file).write_text(json.dumps(content))
        return open_checkpoint(directory)

    return write


@pytest.fixture
def dense() -> Callable[[Checkpoint, Any], torch.Tensor]:
    """The dense weight that a Packed means, codes by QTensor.dequantize and one rounding to its dtype."""
    from compress.checkpoint.reader import torch_dtype
    from compress.numerics.qtensor import QTensor, as_matrix, part_specs
    from compress.spec.weight_state import State, Weight

    def read(checkpoint: Checkpoint, packed: Any) -> torch.Tensor:
        value = packed.read(checkpoint.read)
        assert isinstance(value, QTensor) == (packed.scheme is not None)
        if isinstance(value, QTensor):
            assert value.scheme == packed.scheme
            assert value.codes.dtype == torch.uint8
            weight = Weight(packed.name, packed.dtype, packed.shape, transposed=packed.transposed)
            specs = part_specs(weight, State(packed.scheme))
            assert value.codes.shape == as_matrix(weight, torch.empty(packed.shape, device="meta")).shape
            for part in ("scale", "zero", "tensor_scale"):
                found = getattr(value, part)
                assert (found is None) == (part not in specs)
                assert found is None or (found.dtype, tuple(found.shape)) == (torch_dtype(specs[part][0]), specs[part][1])
                assert found is None or found.is_contiguous()
            assert value.codes.is_contiguous()
            value = as_matrix(weight, value.dequantize()).to(torch_dtype(packed.dtype)).contiguous()
        assert value.shape == packed.shape
        assert value.dtype == torch_dtype(packed.dtype)
        assert value.is_contiguous()
        assert set(packed.parts) <= set(checkpoint.refs)
        return value

    return read
