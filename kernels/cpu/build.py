"""Builds the library of CPU kernels that is shipped: `make cpu-kernels`.

That is `python -m compress.kernels.cpu.build`. With --check it only tells whether that is up to date. It needs nothing but libc
when it runs, and of glibc nothing newer than 2.28.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from compress.errors import CompressError, MachineError

FOLDER = Path(__file__).parent
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx512bf16": (*_AVX512, "-mavx512bf16", "-mavx512vnni"), "avx512": _AVX512, "avx2": _AVX2, "plain": ()},
    "aarch64": {"neon": ()},
}
"""Options of the compiler for each instruction set, the best first."""
OPTIONS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)  # fmt: skip
UNITS = ("product", "integers", "expand", "attention", "steps", "block", "dense")
"""Sources that are compiled once for each instruction set."""
GLIBC = (2, 28)
"""The newest version of glibc of which the shipped library may need a symbol."""


@lru_cache(maxsize=1)
def digest() -> str:
    """A hash of everything that goes into the library."""
    found = sha256(repr((ISAS, OPTIONS)).encode())
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def machine() -> str:
    """The name of this kind of CPU, as a key of ISAS has it where there are kernels."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def isas(kind: str) -> dict[str, tuple[str, ...]]:
    """Instruction sets of a kind of CPU; one in plain C++ where there is nothing of its own."""
    return ISAS.get(kind, {"plain": ()})


def compiler() -> str | None:
    """A C++ compiler of this machine."""
    return shutil.which(os.environ.get("CXX", "") or "c++") or shutil.which("g++") or shutil.which("clang++")


def build(out: Path, command: str, kind: str, more: Sequence[str] = ()) -> None:
    """Compiles and links `out` by a compiler; `more` options are for sanitizers. Raises MachineError with what it said."""
    with tempfile.TemporaryDirectory() as scratch:
        units: list[tuple[str, str, tuple[str, ...]]] = [("isa", "", (f'-DSOURCES="{digest()}"',))]
        units += [(unit, f"-{isa}", (*flags, f"-DISA={isa}")) for isa, flags in isas(kind).items() for unit in UNITS]
        objects = [Path(scratch, f"{unit}{name}.o") for unit, name, _ in units]
        commands = [
            [command, *OPTIONS, *flags, *more, "-c", str(FOLDER / f"{unit}.cpp"), "-o", str(made)]
            for (unit, _, flags), made in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = Path(scratch, "whole.so")
        alone = ("-static-libgcc", "-static-libstdc++", "-s") if sys.platform == "linux" else ()
        _run([command, "-shared", *alone, *more, *map(str, objects), "-o", str(whole)])
        beside = out.with_name(f"{out.name}.{os.getpid()}")
        shutil.copyfile(whole, beside)
        os.replace(beside, out)  # other processes see a whole library or none


def shipped(kind: str) -> Path:
    """Where the shipped library for Linux is."""
    return FOLDER / "prebuilt" / f"linux-{kind}.so"


def needed(library: Path) -> tuple[int, ...]:
    """The newest version of glibc of which a library needs a symbol."""
    text = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    return max(tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", text))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in said if "error" in line), said[0] if said else f"status {done.returncode}")
        raise MachineError(Path(command[0]).name, "C++17 to compile", error, "set CXX to another compiler")


def main() -> int:
    """Exit status: 0 if it is built, 1 if --check finds it outdated, or the status of an error."""
    parser = argparse.ArgumentParser(prog="python -m compress.kernels.cpu.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="tell whether it is up to date, and build nothing")
    options = parser.parse_args()
    out = shipped(machine())
    if options.check:
        fresh = out.is_file() and digest().encode() in out.read_bytes()
        print(f"{out.name} is {'up to date' if fresh else 'outdated'}")
        return 0 if fresh else 1
    try:
        command = compiler()
        if command is None:
            raise MachineError("CXX", "a C++ compiler", "none", "install g++ or clang")
        build(out, command, machine())
        if needed(out) > GLIBC:
            raise MachineError(
                out.name, f"symbols of glibc {GLIBC[0]}.{GLIBC[1]}", f"some of {needed(out)}", "build it elsewhere"
            )
    except CompressError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(f"{out.name}: {', '.join(isas(machine()))}, {out.stat().st_size / 1e3:.0f} kB, glibc {'.'.join(map(str, needed(out)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
