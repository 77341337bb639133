"""mlx-lm as a reader: load_model, with MLX's own product of codes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [samples, length] -> logits [samples, length, vocabulary]."""
    # Imported by name, because they are not installed where types are checked.
    mx, utils = importlib.import_module("mlx.core"), importlib.import_module("mlx_lm.utils")
    # Strict: a tensor that the model lacks, or that it has no place for, is an error.
    model, _ = utils.load_model(artifact, strict=True, trust_remote_code=trusted)
    # Scales and biases become floats of that kind, too; codes stay codes.
    model.set_dtype({torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[dtype])
    notes.append(f"on {mx.default_device()}")
    return lambda ids: torch.from_numpy(numpy.array(model(mx.array(ids.numpy())).astype(mx.float32)))
