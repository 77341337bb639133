"""The CUDA driver by ctypes: loads code and launches kernels.

Nothing is initialised here. If there is a tensor on a GPU, torch has made the primary context of that device, which is used;
without a tensor there is nothing to launch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from functools import lru_cache

from compress.errors import MachineError

LIBRARY = "libcuda.so.1"
_STATIC_SHARED = 48 << 10
"""Bytes of shared memory that a block has by default."""
_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
_REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free memory of the GPU",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "take another backend: the code is for another GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the NVIDIA driver, which is older than the compiler of this code",
    "CUDA_ERROR_INVALID_IMAGE": "clear the cache of kernels, and update the NVIDIA driver",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "take another backend",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "run once before a CUDA graph is captured: code is loaded the first time",
}
_SIGNATURES: dict[str, list[type]] = {
    "cuDeviceGet": [c_void_p, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuCtxGetCurrent": [c_void_p],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [c_void_p],
    "cuModuleLoadData": [c_void_p, c_char_p],
    "cuModuleGetFunction": [c_void_p, c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, *[c_void_p] * 3],
    "cuGetErrorName": [c_int, c_void_p],
    "cuGetErrorString": [c_int, c_void_p],
}


class Driver:
    """The used calls of libcuda, with checked results."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
        self.library = library
        self._contexts: dict[int, int] = {}

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function. Raises MachineError with CUDA's name and text of the error."""
        status = getattr(self.library, name)(*arguments)
        if not status:
            return
        code, words = c_char_p(), c_char_p()
        self.library.cuGetErrorName(status, byref(code))
        self.library.cuGetErrorString(status, byref(words))
        error = code.value.decode() if code.value else f"error {status}"
        got = f"{error}: {words.value.decode()}" if words.value else error
        raise MachineError(f"CUDA driver, {name}", "CUDA_SUCCESS", got, _REMEDIES.get(error, ""))

    def context(self, device: int) -> int:
        """The primary context of a device, torch's own."""
        if device not in self._contexts:
            number, found = c_int(), c_void_p()
            self.call("cuDeviceGet", byref(number), device)
            self.call("cuDevicePrimaryCtxRetain", byref(found), number)
            assert found.value is not None
            self._contexts[device] = found.value
        return self._contexts[device]

    def enter(self, device: int) -> bool:
        """Makes the context of a device the thread's current one; returns whether it changed, and must be popped later.

        Threads of the backward pass may have none yet, and a model may lie on several devices.
        """
        current, wanted = c_void_p(), self.context(device)
        self.call("cuCtxGetCurrent", byref(current))
        if current.value == wanted:
            return False
        self.call("cuCtxPushCurrent_v2", wanted)
        return True

    def leave(self) -> None:
        self.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def function(self, device: int, image: bytes, name: str, shared_bytes: int = 0) -> Function:
        """Loads an entry point of a cubin or PTX for good; each block gets `shared_bytes` of dynamic shared memory."""
        module, found = c_void_p(), c_void_p()
        entered = self.enter(device)
        try:
            self.call("cuModuleLoadData", byref(module), image)
            self.call("cuModuleGetFunction", byref(found), module, name.encode())
            if shared_bytes > _STATIC_SHARED:
                self.call("cuFuncSetAttribute", found, _MAX_DYNAMIC_SHARED, shared_bytes)
        finally:
            if entered:
                self.leave()
        assert found.value is not None
        return Function(self, device, found.value, shared_bytes)


@dataclass(frozen=True)
class Function:
    """An entry point on a device."""

    driver: Driver
    device: int
    handle: int
    shared_bytes: int


class Launch:
    """A function with its grid and its arguments, pointers first; only the pointers change from call to call."""

    def __init__(
        self, function: Function, grid: tuple[int, int, int], threads: int, pointers: int, integers: tuple[int, ...]
    ) -> None:
        """`pointers` is the number of pointers."""
        self._function, self._shape = function, (*grid, threads, 1, 1, function.shared_bytes)
        self._pointers, self._integers = (c_void_p * pointers)(), (c_int * len(integers))(*integers)
        places = [ctypes.addressof(self._pointers) + 8 * i for i in range(pointers)]
        places += [ctypes.addressof(self._integers) + 4 * i for i in range(len(integers))]
        self._places, self._lock = (c_void_p * len(places))(*places), threading.Lock()

    def __call__(self, stream: int, pointers: Sequence[int | None]) -> None:
        """Launches it on a stream; None is a null pointer."""
        driver = self._function.driver
        entered = driver.enter(self._function.device)
        try:
            # Locked, because another thread may launch it, too; the driver has copied the arguments when the call returns.
            with self._lock:
                self._pointers[:] = [*pointers]
                driver.call("cuLaunchKernel", self._function.handle, *self._shape, stream, self._places, None)
        finally:
            if entered:
                driver.leave()


@lru_cache(maxsize=1)
def driver() -> Driver:
    """The CUDA driver. Raises MachineError if there is none."""
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except (OSError, AttributeError) as error:
        raise MachineError(LIBRARY, "the CUDA driver", str(error), "install the NVIDIA driver, or use the CPU") from None
