"""GPTQModel as a reader: GPTQModel.load with its plain torch kernel on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [samples, length] -> logits [samples, length, vocabulary]."""
    # Imported by name, because it is not installed where types are checked.
    gptqmodel = importlib.import_module("gptqmodel")
    # A folder of links, because some readers write into the folder that they read.
    copy = scratch / "artifact"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).symlink_to(file.absolute())
    if str(dtype) == "torch.float32":
        # Its kernels compute in half precision only, in which scales are stored.
        dtype = importlib.import_module("torch").float16
        notes.append("it computes in float16: its kernels know no float32")
    model = gptqmodel.GPTQModel.load(
        str(copy), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=dtype, trust_remote_code=trusted
    )
    inner = model.model.eval()
    return lambda ids: inner(input_ids=ids, use_cache=False).logits
