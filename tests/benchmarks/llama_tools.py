"""llama.cpp's quantizer: llama-quantize, built once from the source package of llama-cpp-python, kept in the cache.

    python tests/benchmarks/llama_tools.py

For a CPU with AVX2 whatever the machine has, so that the same source gives the same files. The library is built by llama.cpp's own
CMake files; the tool is linked by hand from the few files that it needs, which saves most of an hour of chat templates. Ten minutes of
one core. What was built, from what and by what stands in built.json beside the tool. Prints its path.
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

PACKAGE, VERSION, TOOL = "llama-cpp-python", "0.3.36", "llama-quantize"
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF", "-DGGML_LLAMAFILE=OFF", "-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip
LINKED = (
    "-O1",
    "-std=c++17",
    "-ffunction-sections",
    "-fdata-sections",
    "-Wl,--gc-sections",
    "-DGGML_USE_CPU",
    "-DLLAMA_SUBPROCESS",
)
FOLDERS = ("include", "ggml/include", "common", "vendor", "tools/quantize")
SOURCES = (
    "tools/quantize/main.cpp", "tools/quantize/quantize.cpp", "common/imatrix-loader.cpp", "common/common.cpp", "common/log.cpp",
    "common/json.cpp",
)  # fmt: skip
ARCHIVES = (
    "common/libllama-common-base.a", "src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a",
)  # fmt: skip


def llama_quantize(tell: Callable[[str], None]) -> Path:
    """The tool. Raises MachineError without the package, a compiler or room."""
    key = hashlib.sha256(json.dumps([PACKAGE, VERSION, FLAGS, LINKED, SOURCES]).encode()).hexdigest()[:12]
    place = folder_of("llama.cpp") / f"{VERSION}-{key}"
    if (place / "built.json").is_file():
        return place / TOOL
    if missing := [name for name in ("cmake", "c++") if shutil.which(name) is None]:
        raise MachineError(TOOL, "cmake and a C++ compiler", f"no {missing[0]}", "install them (Debian: cmake g++)")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        log = place.with_name(f"{place.name}.log")
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.tmp-") as folder, open(log, "wb") as record:
            tell(f"building {TOOL} of {PACKAGE} {VERSION}, many minutes; this is done once, in {place}, told in {log}")

            def run(*command: str) -> None:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=record, stderr=subprocess.STDOUT)
                if done.returncode:
                    raise MachineError(TOOL, " ".join(command[:2]), f"status {done.returncode}", f"see {log}")

            package = fetched(run, Path(folder))
            made = build(run, package, Path(folder))
            (made / "built.json").write_text(json.dumps(facts(package), indent=1) + "\n")
            if not (place / "built.json").is_file():  # another process may have been faster
                os.rename(made, place)
    except OSError as error:
        do = "free some space there, or set COMPRESS_CACHE to another disk"
        raise MachineError(str(place.parent), "room for the sources and objects, 1 GB", str(error), do) from None
    return place / TOOL


def build(run: Callable[..., None], package: Path, folder: Path) -> Path:
    """The folder with the tool. Raises MachineError."""
    with tarfile.open(package) as archive:
        archive.extractall(folder, filter="data")
    source, objects, made = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp")), folder / "build", folder / "made"
    made.mkdir()
    run("cmake", "-S", str(source), "-B", str(objects), *FLAGS)
    run("cmake", "--build", str(objects), "--target", "llama", "llama-common-base")
    includes = [f"-I{source / name}" for name in FOLDERS]
    files = [*(str(source / name) for name in SOURCES), *(str(objects / name) for name in ARCHIVES)]
    run("c++", *LINKED, *includes, *files, "-lpthread", "-ldl", "-o", str(made / TOOL))
    return made


def fetched(run: Callable[..., None], folder: Path) -> Path:
    """The source package, by pip, which builds nothing of it. Raises MachineError."""
    wanted = ["--no-deps", "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    run(sys.executable, "-m", "pip", "download", *wanted)
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def facts(package: Path) -> dict[str, object]:
    """What was built."""
    with open(package, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[:1]
    return {"package": f"{PACKAGE} {VERSION}", "sha256": sha256, "flags": [*FLAGS, *LINKED], "compiler": compiler}


if __name__ == "__main__":
    print(llama_quantize(tell))
