"""A double of libcuda, for tests of what is launched without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.kernels.cuda import device, driver
from compress.kernels.cuda.cubins import Capability
from emulated import Emulator

H100 = Capability(9, 0)


class Libcuda(driver.Driver):
    """The driver with the double beneath; tensors on the CPU are its device memory."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.taken.restype = ctypes.c_char_p
        super().__init__(library)

    def taken(self) -> list[str]:
        """What the double was told since the last time."""
        return self.library.taken().decode().splitlines()


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The one of a process: kernels find its fibers by name, and would find another's."""
    return Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="session")
def libcuda_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the double of libcuda is built by g++, which is not installed")
    out = tmp_path_factory.mktemp("libcuda") / "libcuda.so"
    source = Path(__file__).with_name("libcuda.cpp")
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", source, "-o", out, "-ldl"], check=True
    )
    return out


@pytest.fixture
def libcuda(libcuda_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Libcuda]:
    """Two GPUs like an H100, which run on tensors of the CPU."""
    double = Libcuda(libcuda_path)
    caches = (device._function, device._prepared)
    monkeypatch.setattr(device, "driver", lambda: double)
    monkeypatch.setattr(device, "usable", lambda kind: H100)
    monkeypatch.setattr(device, "capability", lambda number: H100)
    monkeypatch.setattr(device, "processors", lambda number: 132)
    monkeypatch.setattr(device, "_stream", lambda number: 77)
    for cache in caches:
        cache.cache_clear()
    double.taken()
    yield double
    for cache in caches:
        cache.cache_clear()
