"""simd: C++ kernels for CPUs against fp64, at the ends of pages, by any number of threads; their library as it is built and found."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.reader import open_checkpoint
from compress.errors import MachineError, Refusal, UsageError
from compress.kernels.cpu import build, library
from compress.kernels.cpu.library import Library
from compress.kernels.dispatch import Work
from compress.kernels.native import simd
from compress.kernels.native.modules import PackedWeight
from compress.kernels.native.packed import Packed, pack
from compress.layerwise.model import build as dense_model
from compress.numerics import lowrank, outliers
from compress.numerics.rounding import nearest
from compress.runtime import artifact
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from simd_oracle import BEST, SCHEMES, USABLE, at_the_end_of_a_page, differences, prepared, wrong
from support import SHARED, logits, run, shared

HERE = Path(__file__).parent


SOME = (
    "w2a16g32-asym",
    "w3a16g64-asym",
    "w4a16g32-min",
    "w5a16g32",
    "w6a16g64",
    "w8a16",
    "nf4g64",
    "fp8-e5m2",
    "fp8-block",
    "nvfp4",
)
EACH = [
    pytest.param(text, isa, marks=[] if isa == BEST or text in SOME else [pytest.mark.slow]) for text in SCHEMES for isa in USABLE
]


@pytest.mark.parametrize(("text", "isa"), EACH)
def test_every_scheme_by_every_instruction_set(text: str, isa: str) -> None:
    assert list(differences(Library(simd.library().path, isa), text)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 20, 130])
def test_outliers_and_factors_are_added(tokens: int, dtype: torch.dtype) -> None:
    w = torch.randn(80, 192).to(dtype)
    split = outliers.split(w, Outliers(0.02))
    q = replace(nearest(split.rest, Scheme.parse("w3a16g64-asym"), dtype).q, outliers=split.sparse)
    q = replace(q, lowrank=lowrank.stored(*lowrank.best(w.float() - q.dequantize(), 3), Lowrank(3)))
    state = State(q.scheme, None, Outliers(0.02), Lowrank(3))
    packed = Packed(state, 80, 192, pack(q))
    held, x = PackedWeight(packed, dtype, backend="simd"), torch.randn(tokens, 192).to(dtype)
    exact = x.double() @ q.dequantize().double().T
    assert (held.linear(x) - exact).abs().max() <= (2.0**-7 if dtype == torch.bfloat16 else 2e-6) * exact.abs().max()
    assert torch.equal(held.dense(), q.dequantize().to(dtype))
    assert torch.equal(held.lookup(torch.tensor([3, 79])), q.dequantize()[[3, 79]].to(dtype))


@pytest.mark.parametrize("text", ["w4a16g32", "w3a16g64-asym", "nf4g64", "nvfp4", "fp8-tensor"])
@pytest.mark.parametrize("counts", [[1, 0, 2], [30, 0, 9], [0, 0, 200]])
def test_experts_take_their_tokens(text: str, counts: list[int]) -> None:
    q = nearest(torch.randn(3, 80, 128).bfloat16(), Scheme.parse(text), torch.bfloat16).q
    held = PackedWeight(Packed(State(q.scheme), 80, 128, pack(q)), torch.float32, backend="simd")
    offsets, x = torch.tensor([0, *counts]).cumsum(0).int(), torch.randn(sum(counts), 128)
    found = held.grouped(x, offsets)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        torch.testing.assert_close(found[start:end], x[start:end] @ q.dequantize()[expert].T, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("text", ["w4a16g32", "w3a16g64", "w2a16g256", "w5a16g32", "w6a16g64-asym", "nvfp4", "fp8"])
@pytest.mark.parametrize("isa", USABLE)
def test_nothing_is_read_or_written_beyond_its_end(text: str, isa: str) -> None:
    held, dense = prepared(Scheme.parse(text), 33, 768, torch.bfloat16)
    pages = [at_the_end_of_a_page(part) for part in held.parts.values()]
    parts = dict(zip(held.parts, (part for part, _ in pages), strict=True))
    assert list(wrong(Library(simd.library().path, isa), replace(held, parts=parts), dense, torch.bfloat16, text)) == []
    weight, used = simd.weight_of(replace(held, parts=parts)), Library(simd.library().path, isa)
    for tokens in (1, 29):
        (x, _), (out, _) = (at_the_end_of_a_page(torch.randn(tokens, width).bfloat16()) for width in (768, 33))
        used.product(weight, x, None, out)
        torch.testing.assert_close(out.float(), x.float() @ dense.T, rtol=1e-2, atol=1e-2)
    (whole, _) = at_the_end_of_a_page(torch.empty(33, 768, dtype=torch.bfloat16))
    used.expand(weight, slice(0, 33), whole)
    assert torch.equal(whole, dense.bfloat16())


@pytest.mark.parametrize("text", ["w4a16g64", "w8a16g32-asym", "nf4g64"])
@pytest.mark.parametrize("isa", USABLE)
def test_many_tokens_are_multiplied_a_part_at_a_time(text: str, isa: str) -> None:
    held, dense = prepared(Scheme.parse(text), 33, 256, torch.bfloat16)
    weight, used = simd.weight_of(held), Library(simd.library().path, isa)
    x, bias = torch.randn(1100, 264).bfloat16()[:, :256], torch.randn(33).bfloat16()
    out, part = torch.empty(1100, 33).bfloat16(), torch.empty(76, 33).bfloat16()
    used.product(weight, x, bias, out, rounded=True)
    used.product(weight, x[1024:], bias, part, rounded=True)
    assert torch.equal(out[1024:], part)
    exact = x.double() @ dense.double().T + bias.double()
    assert (out.double() - exact).norm() <= 2.0**-8 * exact.norm()


@pytest.mark.parametrize("text", ["w4a16g64", "nf4g64", "fp8"])
def test_what_rounds_values_is_no_further_off_than_a_dense_weight(text: str) -> None:
    held, dense = prepared(Scheme.parse(text), 64, 512, torch.bfloat16)
    x = torch.randn(300, 512).bfloat16()
    exact = x.double() @ dense.double().T
    ours = (simd.Simd().linear(x, held, None, False).double() - exact).norm()
    assert ours <= 1.02 * ((x @ dense.bfloat16().T).double() - exact).norm()


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_threads_change_no_bit(tokens: int) -> None:
    held, _ = prepared(Scheme.parse("w4a16g64-asym"), 272, 768, torch.bfloat16)
    x, before, found = torch.randn(tokens, 768).bfloat16(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(simd.Simd().product(x, held, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_threads_are_those_of_torch() -> None:
    code = """
import os, torch
from compress.kernels.native import simd
from simd_oracle import prepared
from compress.spec.scheme import Scheme
torch.set_num_threads(2)
a = torch.randn(900, 900)
a @ a
torch.ones(1 << 22).add_(1)
before = len(os.listdir("/proc/self/task"))
held, _ = prepared(Scheme.parse("w4a16g64"), 512, 1024, torch.bfloat16)
runs = simd.library()
for _ in range(3):
    simd.Simd().product(torch.randn(1, 1024).bfloat16(), held, None)
print(before, len(os.listdir("/proc/self/task")), runs.parallel is not None)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        check=True,
    )
    before, after, pool = done.stdout.split()
    assert (before, pool) == (after, "True")


@pytest.mark.parametrize(("name", "scheme"), shared(
    ["stories260k", "tiny-llama-3m", "tiny-mixtral-9m"],
    ["w4a16g32", "w3a16g32-asym", "w2a16g16-asym", "nf4g64", "fp4g32", "fp8"], one_in=3,
))  # fmt: skip
def test_trained_models_run_by_it(name: str, scheme: str, tmp_path: Path) -> None:
    if not (SHARED / "models" / name).is_dir():
        pytest.skip("no trained models beside this checkout")
    run(SHARED / "models" / name, tmp_path / "out", f"quantize.rtn(scheme={scheme}, ragged=channel) | pack(format=native)")
    wanted = logits(dense_model(open_checkpoint(tmp_path / "out"), rounded=False))
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
        model = compress.load(tmp_path / "out", dtype)
        assert set(artifact.backends(model)) == {"simd"}
        assert (logits(model) - wanted).norm() < bound * wanted.norm()


def test_refusals() -> None:
    scheme = Scheme.parse("w4a16g32")
    work = Work(State(scheme), 64, 64, torch.bfloat16, torch.bfloat16, "cpu")
    for changed, said in (
        (replace(work, device="cuda"), "lies on cuda"),
        (replace(work, turned=True), "adds over its rows"),
        (replace(work, dtype=torch.float64), "activations are float64"),
        (replace(work, scales=torch.float64), "scales are float64"),
        (replace(work, state=State(None)), "not in codes"),
    ):
        with pytest.raises(Refusal, match=said):
            simd.Simd().refuse(changed)


# The library


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No library is shipped, and none was built before. Returns the folder of built ones."""
    monkeypatch.setattr(library, "shipped", lambda kind: tmp_path / "none.so")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    library.library.cache_clear()
    yield tmp_path / "kernels"
    library.library.cache_clear()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="the library is shipped for Linux on x86-64"
)
def test_the_shipped_library_was_built_from_these_sources() -> None:
    assert Library(build.shipped("x86_64")).sources == build.digest(), "make cpu-kernels"
    if shutil.which("objdump"):
        assert build.needed(build.shipped("x86_64")) <= build.GLIBC


def test_without_a_compiler_others_run(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compiler", lambda: None)
    held = Packed(
        State(Scheme.parse("w3a16g32")), 16, 64, pack(nearest(torch.randn(16, 64), Scheme.parse("w3a16g32"), torch.float32).q)
    )
    assert PackedWeight(held, torch.float32).backend == "cpu"
    with pytest.raises(UsageError, match=r"no library for .* is shipped"):
        PackedWeight(held, torch.float32, backend="simd")


def test_a_compiler_that_fails_is_told(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compiler", lambda: shutil.which("false"))
    with pytest.raises(Refusal, match="there are no CPU kernels: false: status 1"):
        library.library()
    assert not list(alone.glob("*.so"))


def test_a_folder_that_cannot_be_written_is_told(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone.write_text("a file, not a folder")
    monkeypatch.setattr(library, "build", lambda place, *_: place.write_bytes(b""))
    with pytest.raises(Refusal, match=r"COMPRESS_CACHE|Not a directory"):
        library.library()


def test_what_is_no_library_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(MachineError, match="install compress again"):
        Library(tmp_path / "x.so")


@pytest.mark.slow
def test_it_is_compiled_where_none_is_shipped(alone: Path, caplog: pytest.LogCaptureFixture) -> None:
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    with caplog.at_level(logging.INFO, "compress"):
        found = library.library()
    assert (found.path.parent, found.isa) == (alone, BEST)
    assert "compiles the CPU kernels" in caplog.text
    assert list(differences(found, "w3a16g64-asym")) == []
    library.library.cache_clear()
    written = found.path.stat().st_mtime_ns
    assert library.library().path.stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.parametrize("isa", USABLE)
def test_sanitizers_find_nothing(isa: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    command = shutil.which("g++")
    if command is None:
        pytest.skip("sanitizers are those of g++")
    out = tmp_path_factory.getbasetemp() / "sanitized" / "kernels.so"
    if not out.is_file():
        build.build(out, command, build.machine(), ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"))
    runtime = subprocess.run([command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    env = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "simd_oracle.py"), str(out), isa], capture_output=True, text=True, env=env
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"by {isa}: as fp64 has them" in done.stdout


@pytest.mark.slow
def test_neon_has_what_plain_code_has(tmp_path: Path) -> None:
    command, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if command is None or emulator is None:
        pytest.skip(
            "NEON is compiled by aarch64-linux-gnu-g++ and run by qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)"
        )
    objects = []
    for isa in ("neon", "plain"):
        for unit in build.UNITS:
            objects.append(tmp_path / f"{unit}-{isa}.o")
            more = ["-DPORTABLE"] if isa == "plain" else []
            source = build.FOLDER / f"{unit}.cpp"
            subprocess.run([command, *build.OPTIONS, *more, f"-DISA={isa}", "-c", source, "-o", objects[-1]], check=True)
    program = tmp_path / "neon"
    subprocess.run(
        [command, "-std=c++17", "-O1", "-static", f"-I{build.FOLDER}", HERE / "neon.cpp", *objects, "-o", program], check=True
    )
    done = subprocess.run([emulator, str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1112 comparisons, 0 differ\n")
