"""Device: the GPU or the CPU that passes and measurements compute on.

`auto` is a GPU if torch can use one, else the CPU; under torchrun each process takes the GPU of its local rank. Tensors are read
and written on the host; they are moved to the device and back by functions of this file, or by an explicit `to`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import MachineError, UsageError

if TYPE_CHECKING:
    from compress.context import Context

WORDS = "auto, cpu, cuda or cuda:N"
_OTHERS = ("mps", "xpu", "hip", "npu", "tpu", "xla", "hpu")
CPU = torch.device("cpu")


def device_of(ctx: Context) -> torch.device:
    """Where this process computes. Raises UsageError, MachineError."""
    return resolve(ctx.device, ctx.world_size)


def resolve(asked: str, world_size: int = 1) -> torch.device:
    """The device for a value of --device, made torch's current one if it is a GPU. Raises UsageError, MachineError."""
    kind, colon, number = asked.partition(":")
    if kind in _OTHERS:
        raise UsageError("--device", WORDS, f"'{asked}', where nothing of this has ever run", "say cpu")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not number.isdecimal())):
        raise UsageError("--device", WORDS, f"'{asked}'")
    there, where = gpus(), f"--device {asked}"
    if kind == "cpu" or (kind == "auto" and not there):
        return CPU
    if not there:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
        got = f"none (torch {torch.__version__}, {built})"
        raise MachineError(where, "a GPU that torch can use", got, "say cpu, or take a machine that has one")
    if world_size > 1:
        own = os.environ.get("LOCAL_RANK", "0")
        if number not in ("", own):
            do = "leave the number out"
            raise UsageError("--device", "cuda: each process takes the GPU of its own number", f"'{asked}'", do)
        if int(number := own) >= there:
            expected = f"a GPU for each process, number {own} for this one"
            raise MachineError(where, expected, f"{there} here", f"start {there} processes, or say --device cpu")
    if int(number or 0) >= there:
        raise MachineError(where, "a GPU of that number", f"{there} here, counted from 0", "say one that is there")
    found = torch.device("cuda", int(number or 0))
    make_current(found)
    return found


def gpus() -> int:
    """How many GPUs torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def make_current(device: torch.device) -> None:
    """Makes this GPU the default of kernels, accelerate and NCCL."""
    torch.cuda.set_device(device)


def name_of(device: torch.device) -> str:
    """The name of a GPU, empty for the CPU. GPU and torch version together determine how results are rounded."""
    return "" if device.type == "cpu" else torch.cuda.get_device_name(device)


def memory_of(device: torch.device) -> tuple[int, int]:
    """(free bytes, total bytes) of a GPU."""
    return torch.cuda.mem_get_info(device)


def peak_of(device: torch.device) -> int:
    """Peak bytes of tensors on a GPU in this process so far; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def backends(device: torch.device) -> str:
    """Backends of torch.distributed: gloo for host tensors, NCCL for those of GPUs if torch has it."""
    import torch.distributed as dist

    return "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"


def made_on(device: torch.device, make: Callable[[int], Any], width: int) -> Any:
    """Calls `make` with this device as the default for the tensors that it creates."""
    with device:
        return make(width)


def moved(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on a device: a tensor, or an object that holds some in fields, tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, list):
        return [moved(part, device) for part in value]
    if isinstance(value, tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        inside = {field.name: getattr(value, field.name) for field in fields(value)}
        new = {name: part for name, old in inside.items() if (part := moved(old, device)) is not old}
        return replace(value, **new) if new else value
    return value
