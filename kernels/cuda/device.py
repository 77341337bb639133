"""The GPUs that torch sees, and launching kernels on their streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from compress.errors import Refusal
from compress.kernels.cuda import cubins
from compress.kernels.cuda.cubins import Capability
from compress.kernels.cuda.driver import Function, Launch, driver
from compress.kernels.cuda.variant import Variant

_DO = "leave the backend to be chosen, or load the model on an NVIDIA GPU"


def usable(kind: str) -> Capability:
    """The capability of the oldest GPU. Raises Refusal if there is no GPU, or if `kind`, the weight's device, is not cuda."""
    if kind != "cuda":
        raise Refusal(f"the weight lies on {kind}", _DO)
    if torch.version.cuda is None:
        raise Refusal("this torch is built without CUDA", "install a torch that is built for CUDA")
    if not torch.cuda.is_available():
        raise Refusal("torch finds no CUDA driver, or no GPU", "see what nvidia-smi says")
    return min(capability(index) for index in range(torch.cuda.device_count()))


@lru_cache(maxsize=64)
def capability(device: int) -> Capability:
    """Of a GPU."""
    return Capability(*torch.cuda.get_device_capability(device))


@lru_cache(maxsize=64)
def processors(device: int) -> int:
    """The number of streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def number(like: torch.Tensor) -> int:
    """The number of the device that a tensor lies on."""
    return like.device.index or 0


def run(
    variant: Variant, grid: tuple[int, int, int], threads: int, tensors: Sequence[torch.Tensor | None], *integers: int
) -> None:
    """Launches a kernel on the current stream of its first tensor's device. None is a null pointer.

    Code is loaded on first use. Raises MachineError for errors of the driver or the compiler.
    """
    assert tensors[0] is not None
    device = number(tensors[0])
    launch = _prepared(variant, device, grid, threads, len(tensors), integers)
    launch(_stream(device), [None if tensor is None else tensor.data_ptr() for tensor in tensors])


@lru_cache(maxsize=1024)
def _prepared(
    variant: Variant, device: int, grid: tuple[int, int, int], threads: int, pointers: int, integers: tuple[int, ...]
) -> Launch:
    return Launch(_function(variant, device), grid, threads, pointers, integers)


@lru_cache(maxsize=512)
def _function(variant: Variant, device: int) -> Function:
    code = cubins.find(variant, capability(device))
    return driver().function(device, code.image, variant.source)


def _stream(device: int) -> int:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream
