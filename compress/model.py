"""Model: a runnable model from a checkpoint in any state.

Codes are expanded to the dense dtype by QTensor.dequantize, the one meaning they have; transformers then places
the tensors by its own mapping. Meant for models that fit in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress import qtensor
from compress.checkpoint import CANONICAL, Checkpoint, torch_dtype
from compress.errors import InputError
from compress.facts import State, Weight
from compress.names import model_class

if TYPE_CHECKING:
    import torch
    from torch import nn


def dense_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every weight as the dense tensor it means, by its source name."""
    manifest = checkpoint.manifest
    records = manifest.weights if manifest else {}
    packed = None
    if manifest and manifest.format != "canonical":
        from compress.kernels.dispatch import load_format

        packed = load_format(manifest.format)()
    found: dict[str, torch.Tensor] = {}
    held: set[str] = set()
    for name, record in records.items():
        state = State.parse(record.state)
        if state.scheme is None:
            continue
        weight = Weight(name, record.dtype, record.shape, transposed=record.transposed)
        specs = packed.specs(weight, state) if packed else qtensor.specs(weight, state)
        parts = {spec.name: checkpoint.read(spec.name) for spec in specs}
        q = packed.decode(weight, state, parts) if packed else qtensor.decode(weight, state, parts)
        found[name] = qtensor.as_matrix(weight, q.dequantize()).to(torch_dtype(record.dtype)).contiguous()
        held.update(parts)
    return {**{name: checkpoint.read(name) for name in checkpoint.refs if name not in held}, **found}


def build(checkpoint: Checkpoint, dtype: str = "float32") -> nn.Module:
    """A model in eval mode, computing in `dtype`. Raises InputError for a foreign quantized checkpoint."""
    import torch

    quantization = checkpoint.config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    ours = checkpoint.manifest is not None and method in (CANONICAL, checkpoint.manifest.format)
    if quantization and not ours:
        raise InputError(str(checkpoint.path), "a checkpoint that compress made, or a dense one", f"one quantized by {method}")
    cls, config = model_class(checkpoint.config)
    model = cls.from_pretrained(  # type: ignore[attr-defined]
        None, config=config, state_dict=dense_tensors(checkpoint), dtype=getattr(torch, dtype)
    )
    assert isinstance(model, torch.nn.Module)
    return model.eval()
