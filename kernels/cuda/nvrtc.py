"""NVRTC by ctypes: compiles CUDA C++ to a cubin or PTX, without GPU or toolkit.

The library is the one that torch's wheels install, in `nvidia/cuda_nvrtc` for CUDA 12 and `nvidia/cu13` for CUDA 13, or the
system's.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cached_property, lru_cache
from pathlib import Path

from compress.errors import MachineError

_FOLDERS = {12: "nvidia/cuda_nvrtc/lib", 13: "nvidia/cu13/lib"}
"""CUDA's major version -> the folder in which wheels install the library."""
_LIBC = ctypes.CDLL(None)
_LIBC.uselocale.argtypes, _LIBC.uselocale.restype = [c_void_p], c_void_p
_DO = "install nvidia-cuda-nvrtc-cu12, or a torch that is built for CUDA"


class Nvrtc:
    """One version of the compiler."""

    def __init__(self, path: str) -> None:
        """Loads the library. Raises MachineError if that fails."""
        try:
            # NVRTC looks for its builtins by name, and finds them only if they are loaded already.
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise MachineError(path, "NVRTC, the compiler of CUDA", str(error), _DO) from None
        self._library.nvrtcGetErrorString.restype = c_char_p

    @cached_property
    def version(self) -> str:
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        return f"{major.value}.{minor.value}"

    @cached_property
    def architectures(self) -> tuple[int, ...]:
        """The architectures it compiles for, ascending: 75, 80, ..."""
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        found = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return tuple(sorted(found))

    def compile(self, name: str, source: str, headers: Mapping[str, str], target: str, options: Sequence[str]) -> bytes:
        """Compiles a cubin for a `target` such as sm_90a, or PTX for compute_80.

        Raises MachineError with the compiler's log.
        """
        program = c_void_p()
        texts, names = ([text.encode() for text in part] for part in (headers.values(), headers))
        arrays = [(c_char_p * len(part))(*part) for part in (texts, names)]
        self._call("nvrtcCreateProgram", byref(program), source.encode(), name.encode(), len(headers), *arrays)
        # NVRTC leaves the thread in the locale C, in which Python reads files as ASCII.
        before = _LIBC.uselocale(None)
        try:
            all_options = [option.encode() for option in (f"--gpu-architecture={target}", *options)]
            status = self._library.nvrtcCompileProgram(program, len(all_options), (c_char_p * len(all_options))(*all_options))
            if status:
                log = self._bytes("nvrtcGetProgramLog", program).decode(errors="replace")
                got = f"{self._library.nvrtcGetErrorString(status).decode()}\n{log.strip()}"
                raise MachineError(f"NVRTC {self.version}, {name} for {target}", "a kernel", got, "use another backend")
            return self._bytes("nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX", program)
        finally:
            _LIBC.uselocale(before)
            self._call("nvrtcDestroyProgram", byref(program))

    def _bytes(self, name: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._call(f"{name}Size", program, byref(size))
        found = ctypes.create_string_buffer(size.value)
        self._call(name, program, found)
        return found.raw.rstrip(b"\0") if name.endswith("Log") else found.raw

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise MachineError(f"NVRTC, {name}", "success", self._library.nvrtcGetErrorString(status).decode(), _DO)


@lru_cache(maxsize=4)
def nvrtc(major: int | None = None) -> Nvrtc:
    """The compiler of that major version, else the one that torch uses, else any. Raises MachineError if there is none."""
    for path in _paths(major or _torchs()):
        if major is None or f".so.{major}" in path:
            try:
                return Nvrtc(path)
            except MachineError:
                continue
    raise MachineError("NVRTC", f"libnvrtc.so.{major or '12 or 13'}", "it is not installed", _DO)


def _torchs() -> int | None:
    """The major version of CUDA that torch is built for."""
    import torch

    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def _paths(first: int | None) -> Iterator[str]:
    """Paths to try: wheels before the system's, and the major version `first` before others."""
    for major in sorted(_FOLDERS, key=lambda m: (m != first, m)):
        for base in sys.path:
            yield from sorted(map(str, Path(base, _FOLDERS[major]).glob(f"libnvrtc.so.{major}*")))
        yield f"libnvrtc.so.{major}"
