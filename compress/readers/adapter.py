"""Adapter: what a LoRA folder as PEFT writes it adds to a model of ours.

y += scaling * B (A x) beside each module that has a pair, with scaling = alpha / r, or alpha / sqrt(r) with rslora (Hu et al.,
2106.09685; Kalajdzievski, 2312.03732). Patterns give modules ranks and alphas of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint import read_json
from compress.errors import InputError

_PREFIX = "base_model.model."


def add_adapter(model: nn.Module, folder: Path) -> None:
    """Hooks an adapter onto a model. Raises InputError for one of another kind, or that does not fit."""
    from safetensors.torch import load_file

    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        got = f"{config.get('peft_type')}" + (" with DoRA" if config.get("use_dora") else "")
        raise InputError(str(folder), "a LoRA adapter without DoRA and modules_to_save", got)
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
        module.register_forward_hook(_adding(a.float(), b.float(), _scaling(config, path, a.shape[0])))


def _scaling(config: dict[str, Any], path: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _adding(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return output + ((x.to(a.dtype) @ a.T) @ b.T * scaling).to(output.dtype)

    return hook
