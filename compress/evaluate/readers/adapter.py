"""Adapter: applies a LoRA folder, as PEFT writes it, to a model of ours.

y += scaling * B (A x) for each module that has a pair; see lora.py for the scaling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint.reader import read_json
from compress.errors import InputError
from compress.importers.lora import refuse_other, scaling

_PREFIX = "base_model.model."


def add_adapter(model: nn.Module, folder: Path) -> None:
    """Hooks an adapter onto a model. Raises InputError for one of another kind, or that does not fit."""
    from safetensors.torch import load_file

    config = read_json(folder / "adapter_config.json")
    refuse_other(str(folder), config)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(str(file), "the adapter's tensors", "no such file")
    tensors = load_file(file)
    pairs = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    if rest := [n for n in tensors if n.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") not in pairs]:
        raise InputError(str(file), "pairs of lora_A and lora_B", ", ".join(rest[:3]))
    for pair in sorted(pairs):
        path = pair.removeprefix(_PREFIX)
        a, b = tensors[f"{pair}.lora_A.weight"], tensors.get(f"{pair}.lora_B.weight")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise InputError(str(file), "modules of the base model", f"'{path}'", "give the base it was made for") from None
        if b is None or a.shape[0] != b.shape[1]:
            raise InputError(str(file), f"lora_B of '{path}' [out, {a.shape[0]}]", "none" if b is None else f"{list(b.shape)}")
        module.register_forward_hook(_adding(a.float(), b.float(), scaling(config, path, a.shape[0])))


def _adding(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return output + ((x.to(a.dtype) @ a.T) @ b.T * scaling).to(output.dtype)

    return hook
