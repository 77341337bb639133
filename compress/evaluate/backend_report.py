"""Backend report: which backend runs packed weights here, and why no faster one.

Each backend answers for itself whether it can run a weight, and if not, why; this file knows none of their limits.
"""

from __future__ import annotations

import ctypes
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compress.architecture.weight_map import meta_model
from compress.checkpoint.reader import Checkpoint, torch_dtype
from compress.errors import CompressError, MachineError, Refusal
from compress.kernels.cpu.library import library
from compress.kernels.cuda import cubins
from compress.kernels.cuda.device import usable
from compress.kernels.cuda.driver import driver
from compress.kernels.cuda.nvrtc import nvrtc
from compress.kernels.dispatch import Work, ask
from compress.kernels.native.layout import Native
from compress.pipeline.build_manifest import isa
from compress.pipeline.memory_check import machine_bytes
from compress.runtime.fill import PackedWeights, refuse_other
from compress.runtime.fuse_experts import stacks
from compress.spec.weight_state import State, Weight

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Dtypes of activations -> their names in safetensors files."""
_ROWS, _COLUMNS, _EXPERTS = 4096, 4096, 8
_SCHEMES = (
    "w4a16g128", "w4a16g128-asym", "w4a16", "w3a16g128", "w3a16g128-asym", "w2a16g64", "w2a16g64-asym", "w4a16g128-min",
    "w5a16g64", "w5a16g64-asym", "w6a16g64", "w6a16g64-asym", "w8a16g128", "w8a16", "w8a16-asym", "w8a8", "w4a8g128",
    "w4a8g128-afp8", "w4a4", "w4a4-aasym", "nf4g64", "nf3g64", "nf2g64", "fp4g128", "fp4g128-m2", "e3m0g128", "mxfp4", "nvfp4",
    "mxfp4-amxfp4", "nvfp4-anvfp4", "fp8", "fp8-e5m2", "fp8-tensor", "fp8-block", "fp8-afp8", "fp8-tensor-afp8", "fp8-block-afp8",
)  # fmt: skip
_PLAIN = "codes(w4a16g128)"


@dataclass(frozen=True)
class Use:
    """Weights of one kind, and how they are used (linear, embedding, experts, ...)."""

    work: Work
    weights: int = 1

    @property
    def what(self) -> str:
        """In words."""
        embedding = "embedding and head" if self.work.multiplied else "embedding"
        words = {embedding: self.work.looked_up, "Conv1D": self.work.turned, "experts": self.work.experts is not None}
        return ", ".join([str(self.work.state), *(word for word, holds in words.items() if holds)])


@dataclass(frozen=True)
class Answer:
    """The backend that runs a use, None if none does, and the reasons of the faster ones that do not."""

    use: Use
    backend: str | None
    passed_over: dict[str, str]


def families(dtype: str, device: str) -> Iterator[Use]:
    """A linear in each scheme, and every other use for one scheme; scales as in a model of `dtype`."""
    plain = State.parse(_PLAIN)
    for scheme in _SCHEMES:
        yield _use(State.parse(f"codes({scheme})"), dtype, device)
    for extra in ("+outliers(0.005)", "+lowrank(r16)", "+lowrank(r16-int8)"):
        yield _use(State.parse(_PLAIN + extra), dtype, device)
    yield _use(State.parse("codes(w4a4-aasym)+columns(256)"), dtype, device)
    for masked in (f"{_PLAIN}+masked(2:4)", "masked(2:4)"):
        yield _use(State.parse(masked), dtype, device)
    yield _use(plain, dtype, device, looked_up=True, multiplied=False)
    yield _use(plain, dtype, device, looked_up=True)
    yield _use(plain, dtype, device, turned=True)
    yield _use(plain, dtype, device, experts=_EXPERTS)


def _use(state: State, dtype: str, device: str, **used: Any) -> Use:
    weight = Weight("weight", DTYPES[dtype], (_ROWS, _COLUMNS), "linear")
    specs = {spec.name.rpartition(".")[2]: spec.dtype for spec in Native().specs(weight, state)}
    return Use(Work(state, _ROWS, _COLUMNS, torch_dtype(DTYPES[dtype]), _scales(specs), device, **used))


def _scales(dtypes: Mapping[str, str]) -> torch.dtype:
    """The dtype of scales, or of values without scales, from the `dtypes` of a weight's parts."""
    return torch_dtype(dtypes.get("scale", dtypes["tiles"]))


def artifact_uses(checkpoint: Checkpoint, device: str, dtype: str | None = None) -> list[Use]:
    """The uses of an artifact's weights, with counts, from headers alone. Raises InputError for one that is not native.

    `dtype` is that of activations; None stands for that of config.json.
    """
    refuse_other(checkpoint)
    model: Any = meta_model(checkpoint)
    chosen = torch_dtype(DTYPES[dtype]) if dtype else model.config.dtype or torch.float32
    filling = PackedWeights(model, checkpoint, chosen)
    found: Counter[Work] = Counter()

    def work(name: str) -> Work:
        weight, state = filling.weights[name]
        dtypes = {
            ref.name.rpartition(".")[2]: ref.dtype for ref in map(checkpoint.refs.get, (f"{name}.scale", f"{name}.tiles")) if ref
        }
        return Work(state, weight.rows, weight.columns, chosen, _scales(dtypes), device, weight.transposed)

    for name, group in filling.linears.items():
        looked_up, multiplied = filling.uses(name)
        found[replace(work(group.sources[0]), looked_up=looked_up, multiplied=multiplied)] += 1
    for experts, _ in filling.places.values():
        for matrices in stacks(experts, filling.kind)[0]:
            sources = [name for name, _ in matrices[0]]
            if sources[0] in filling.weights:
                rows = sum(filling.weights[name][0].rows for name in sources)
                one = replace(work(sources[0]), rows=rows, turned=False, experts=len(matrices))
                found[one] += len({name for pieces in matrices for name, _ in pieces})
    return [Use(work, count) for work, count in found.items()]


def answer(use: Use, backend: str | None = None) -> Answer:
    """Asks the backend of that name, or all, the fastest first. Raises UsageError for an unknown name."""
    taken, refused = ask(use.work, backend)
    return Answer(use, taken.name if taken else None, {name: refusal.reason for name, refusal in refused.items()})


def alike(answers: list[Answer]) -> list[Answer]:
    """Merges the answers for weights that differ only in size, and adds up their counts."""
    found: dict[tuple[Any, ...], Answer] = {}
    for one in answers:
        key = (one.use.what, one.use.work.dtype, one.backend, *one.passed_over.items())
        before = found[key].use.weights if key in found else 0
        found[key] = replace(one, use=replace(one.use, weights=before + one.use.weights))
    return list(found.values())


def machine() -> dict[str, Any]:
    """CPU, GPUs, drivers and versions; a text with the reason for each that is missing."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found: dict[str, Any] = {
        "cpu": processor(), "isa": isa(), "threads": torch.get_num_threads(), "memory_bytes": machine_bytes(),
        "gpus": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in gpus
        ],
        "driver": _driver(), "torch": torch.__version__, "torch_cuda": torch.version.cuda or "none: built for the CPU",
        "triton": version("triton"), "nvrtc": _nvrtc(), "cpu_kernels": _cpu_kernels(), "transformers": version("transformers"),
    }  # fmt: skip
    found["no_cuda"] = _no_cuda()
    found["code"] = {str(one): code(one) for one in (cubins.Capability(gpu.major, gpu.minor) for gpu in gpus)}
    return found


def _cpu_kernels() -> str:
    """The instruction set of our kernels for CPUs, and their threads; or why there are none."""
    try:
        return str(library())
    except Refusal as refusal:
        return f"none: {refusal.reason}"


def default_device() -> str:
    """The device of weights by default."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises MachineError for a GPU that is not there."""
    if device == "cuda" and (why := _no_cuda()):
        raise MachineError("--device cuda", "a GPU that torch can use", why, "leave it out, or take a machine that has one")


def processor() -> str:
    """The name of the CPU."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def runs_on(device: str) -> str:
    """Processor and versions, printed next to numbers that are measured on a device."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    return f"{processor()}, {isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def code(capability: cubins.Capability) -> str:
    """The sources of machine code for kernels in CUDA C++, in order of preference."""
    there = [cubins.archive(target).name for target in cubins.targets(capability) if cubins.archive(target).is_file()]
    return ", then ".join([*there, f"NVRTC {_nvrtc()}"])


def _driver() -> str:
    try:
        number = ctypes.c_int()
        driver().library.cuDriverGetVersion(ctypes.byref(number))
    except CompressError as error:
        return f"none: {error.problems[0].got}"
    kernel = Path("/sys/module/nvidia/version")
    own = f"{kernel.read_text().strip()}, " if kernel.is_file() else ""
    return f"{own}CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def _no_cuda() -> str:
    """Why no GPU can be used; empty if one can."""
    try:
        usable("cuda")
    except Refusal as refusal:
        return refusal.reason
    return ""


def _nvrtc() -> str:
    try:
        return nvrtc().version
    except CompressError as error:
        return f"none: {error.problems[0].got}"
