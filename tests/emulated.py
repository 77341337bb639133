"""Kernels in CUDA C++ on the CPU: compiled by g++, run by tests/kernels/emulator, every tensor between pages that nobody may touch."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent / "kernels" / "emulator"
SOURCES = Path(__file__).parents[1] / "kernels" / "native"
_FLAGS = [
    "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-variable",
    "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr",
]  # fmt: skip
_SPOILT = 0xFF
"""Bytes that are NaN in every float."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class Memory:
    """A tensor that ends where a page begins that nobody may touch, after another such page; between them all else is NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count, page = torch.Size(shape).numel(), mmap.PAGESIZE
        size = count * dtype.itemsize
        held = -(-max(size, 1) // page) * page
        self._map = mmap.mmap(-1, held + 2 * page)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._bytes.fill_(_SPOILT)
        # Kernels may take it for granted that a tensor begins at 16 bytes.
        self._start = page + (held - size) // 16 * 16
        self._end = self._start + size
        self._inside = slice(page, page + held)
        self.tensor = self._bytes[self._start : self._end].view(dtype).view(shape)
        self.pointer = self._bytes.data_ptr() + self._start
        for guard in (0, page + held):
            assert not _LIBC.mprotect(ctypes.c_void_p(self._bytes.data_ptr() + guard), ctypes.c_size_t(page), 0)

    @classmethod
    def of(cls, value: torch.Tensor) -> Memory:
        held = cls(tuple(value.shape), value.dtype)
        held.tensor.copy_(value)
        return held

    def whole(self) -> bool:
        """Whether nothing was written beside the tensor."""
        beside = torch.cat([self._bytes[self._inside.start : self._start], self._bytes[self._end : self._inside.stop]])
        return bool((beside == _SPOILT).all())


class Place(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


class Emulator:
    """Compiled kernels, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.compiler = shutil.which("g++") or pytest.skip("CUDA C++ is emulated by way of g++, which is not installed")
        self.folder, self._libraries = folder, {}
        self._launch = self._built(HERE / "emulator.cpp", "emulator", ["-O2"]).launch
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, Place, ctypes.c_uint, ctypes.c_bool]

    def _built(self, source: Path, name: str, options: list[str]) -> ctypes.CDLL:
        if name not in self._libraries:
            out = self.folder / f"{name}.so"
            command = [self.compiler, *_FLAGS, *options, "-x", "c++", source, "-o", out]
            done = subprocess.run(command, capture_output=True, text=True)
            assert not done.returncode, done.stderr
            assert not done.stderr, done.stderr
            self._libraries[name] = ctypes.CDLL(str(out), mode=ctypes.RTLD_GLOBAL if name == "emulator" else ctypes.RTLD_LOCAL)
        return self._libraries[name]

    def kernel(self, source: str, defines: tuple[str, ...]) -> tuple[str, ctypes.CDLL]:
        """The name of a variant, which is its file's in the folder, and its library."""
        name = "-".join([source, *(define[2:].replace("=", "") for define in defines)])
        return name, self._built(SOURCES / f"{source}.cu", name, ["-O1", "-DEMULATED", f"-I{HERE}", *defines])

    def run(
        self,
        source: str,
        defines: tuple[str, ...],
        grid: tuple[int, int, int],
        threads: int,
        arguments: list[Any],
        backwards: bool = False,
    ) -> None:
        """Runs a kernel in a process of its own. `arguments` are Memory, integers, or None for null."""
        name, library = self.kernel(source, defines)
        values = [a.pointer if isinstance(a, Memory) else a or 0 for a in arguments]
        packed = (ctypes.c_uint64 * 18)(*values)
        child = os.fork()
        if not child:
            faulthandler.disable()
            self._launch(getattr(library, source), library.spoil, packed, Place(*grid), threads, backwards)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert not status, f"{name} on {grid}: {signal.Signals(-status).name}"
        assert all(a.whole() for a in arguments if isinstance(a, Memory)), f"{name} on {grid}: written beside a tensor"
