"""State: saves what a training run needs to resume, in one safetensors file.

It holds parameters in fp32 and AdamW's two moments, by the names of weights on disk or of an objective's own parameters, the
objective's buffers, and the number of steps done. Nothing else is needed: the order of samples and the learning rate are
functions of the step, and there is no dropout. The file is replaced by one rename, so it is always complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.context import Context
from compress.errors import MachineError

_KEY = "training"


@dataclass(frozen=True)
class Trained:
    """Parameters by the names under which they are saved, and the optimizer that trains them."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, on the host of every process, of one that may be sharded over processes."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu()


def like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A full value on the device of `tensor`, and sharded like it."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return value.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: torch.Tensor = distribute_tensor(value.to(mesh.device_type), mesh, tensor.placements)  # type: ignore[attr-defined]
    return sharded


def save(path: Path, step: int, trained: Sequence[Trained], buffers: dict[str, torch.Tensor], ctx: Context) -> None:
    """Writes the state after `step` steps; every process must call it. Raises MachineError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"buffer:{name}": buffer.detach().cpu().contiguous() for name, buffer in buffers.items()}
    for each in trained:
        for name, parameter in each.parameters.items():
            moments = each.optimizer.state.get(parameter, {})
            parts = {"value": parameter, "mean": moments.get("exp_avg"), "square": moments.get("exp_avg_sq")}
            for word, part in parts.items():
                if part is not None and (found := whole(part)) is not None and ctx.is_main:
                    tensors[f"{word}:{name}"] = found.contiguous()
    if not ctx.is_main:
        return
    new = path.with_name(f"{path.name}.new")
    try:
        # One key of metadata only: safetensors does not keep the order of several.
        save_file(tensors, new, {_KEY: json.dumps({"step": step})})
        descriptor = os.open(new, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(new, path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        do = "free some space and run the same command again: it goes on from the state before"
        raise MachineError(str(path), "a place to write", str(error), do) from None


def load(path: Path, trained: Sequence[Trained], buffers: dict[str, torch.Tensor]) -> int:
    """Restores a state; returns how many steps were done, 0 if there is no state."""
    if not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(json.loads((file.metadata() or {})[_KEY])["step"])
        held: set[str] = set(file.keys())
        for name, buffer in buffers.items():
            buffer.copy_(file.get_tensor(f"buffer:{name}"))
        for each in trained:
            for name, parameter in each.parameters.items():
                with torch.no_grad():
                    parameter.copy_(like(file.get_tensor(f"value:{name}"), parameter))
                if f"mean:{name}" in held:
                    moments: dict[str, Any] = {"step": torch.tensor(float(step))}
                    for key, word in (("exp_avg", "mean"), ("exp_avg_sq", "square")):
                        moments[key] = like(file.get_tensor(f"{word}:{name}"), parameter).clone()
                    each.optimizer.state[parameter] = moments
    return step
