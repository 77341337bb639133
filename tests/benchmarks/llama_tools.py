"""llama.cpp's tools: llama-quantize and llama-imatrix, built once from the source package of llama-cpp-python, kept in the cache.

    python tests/benchmarks/llama_tools.py

For a CPU with AVX2 whatever the machine has, so that the same source gives the same files; about 20 minutes of one core. What was
built, from what and by what stands in built.json beside the tools. Prints their directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real.table import tell

from compress.checkpoint.cache import folder_of
from compress.errors import MachineError

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
TOOLS = ("llama-quantize", "llama-imatrix")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF", "-DGGML_LLAMAFILE=OFF",
    "-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip
_WHAT = "llama.cpp's tools"


def llama_tools(tell: Callable[[str], None], jobs: int = 1) -> Path:
    """The directory of the tools. Raises MachineError without the package, a compiler or room."""
    key = hashlib.sha256(json.dumps([PACKAGE, VERSION, TOOLS, FLAGS]).encode()).hexdigest()[:12]
    place = folder_of("llama.cpp") / f"{VERSION}-{key}"
    if (place / "built.json").is_file():
        return place
    if missing := [name for name in ("cmake", "c++") if shutil.which(name) is None]:
        raise MachineError(_WHAT, "cmake and a C++ compiler", f"no {missing[0]}", "install them (Debian: cmake g++)")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        log = place.with_name(f"{place.name}.log")
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.tmp-") as folder, open(log, "wb") as record:
            scratch, made = Path(folder), Path(folder) / "made"
            tell(f"building {', '.join(TOOLS)} of {PACKAGE} {VERSION}, long; this is done once, in {place}, told in {log}")

            def run(*command: str) -> None:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=record, stderr=subprocess.STDOUT)
                if done.returncode:
                    raise MachineError(_WHAT, " ".join(command[:2]), f"status {done.returncode}", f"see {log}")

            package = fetched(run, scratch)
            with tarfile.open(package) as archive:
                archive.extractall(scratch, filter="data")
            source = next(scratch.glob("llama_cpp_python-*/vendor/llama.cpp"))
            build = scratch / "build"
            run("cmake", "-S", str(source), "-B", str(build), *FLAGS)
            run("cmake", "--build", str(build), "--target", *TOOLS, "-j", str(jobs))
            made.mkdir()
            for name in TOOLS:
                shutil.copy(build / "bin" / name, made / name)
            (made / "built.json").write_text(json.dumps(facts(package), indent=1) + "\n")
            if not (place / "built.json").is_file():  # another process may have been faster
                os.rename(made, place)
    except OSError as error:
        do = "free some space there, or set COMPRESS_CACHE to another disk"
        raise MachineError(str(place.parent), "room for the sources and objects, 1.5 GB", str(error), do) from None
    return place


def fetched(run: Callable[..., None], folder: Path) -> Path:
    """The source package, by pip, which asks it for its metadata and builds nothing. Raises MachineError."""
    wanted = ["--no-deps", "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    run(sys.executable, "-m", "pip", "download", *wanted)
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def facts(package: Path) -> dict[str, object]:
    """What was built."""
    with open(package, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[:1]
    return {"package": f"{PACKAGE} {VERSION}", "sha256": sha256, "flags": FLAGS, "compiler": compiler, "tools": TOOLS}


if __name__ == "__main__":
    print(llama_tools(tell))
