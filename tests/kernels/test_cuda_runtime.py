"""The runtime of CUDA kernels: launches seen by a double of libcuda, NVRTC for real, and the store of cubins."""

from __future__ import annotations

import ctypes
import locale
import logging
import multiprocessing
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from compress.checkpoint import cache
from compress.errors import MachineError, Refusal, few
from compress.kernels.cuda import build, cubins, device, driver, nvrtc, variant
from compress.kernels.cuda.cubins import Capability
from compress.kernels.cuda.driver import Launch
from compress.kernels.cuda.variant import Variant

if TYPE_CHECKING:
    from conftest import Libcuda

SOURCE = """
#include "half.cuh"
extern "C" __global__ void add(const float* a, float* out, int n) { if (threadIdx.x < n) out[threadIdx.x] = a[threadIdx.x] + MORE; }
"""
ADD = Variant("add", "one", ("-DMORE=HALF",))


@pytest.fixture(scope="module")
def compiler() -> nvrtc.Nvrtc:
    try:
        return nvrtc.nvrtc()
    except MachineError as error:
        pytest.skip(f"NVRTC is not installed: {error}")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sources, archives and a cache of the test's own."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "add.cu").write_text(SOURCE)
    (tmp_path / "sources" / "half.cuh").write_text("#define HALF 0.5f\n")
    monkeypatch.setattr(variant, "FOLDER", tmp_path / "sources")
    monkeypatch.setattr(cubins, "FOLDER", tmp_path / "archives")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget() -> None:
    for cached in (variant._files, variant._digest, cubins._index):
        cached.cache_clear()


def test_a_launch_has_its_arguments_and_only_pointers_change(libcuda: Libcuda) -> None:
    function = libcuda.function(1, b"3 4", "skinny")
    launch = Launch(function, (5, 2, 3), 256, 3, (1, -2, 3, 1 << 30))
    launch(77, (16, None, 1 << 46))
    launch(0, (32, 48, None))
    assert libcuda.taken() == [
        "retain 1",
        f"launch skinny context 1001 stream 77 grid 5 2 3 threads 256 shared 0 arguments 16 0 {1 << 46} 1 -2 3 {1 << 30}",
        f"launch skinny context 1001 stream 0 grid 5 2 3 threads 256 shared 0 arguments 32 48 0 1 -2 3 {1 << 30}",
    ]
    # The thread's own context, none, is as it was; another one comes back too.
    current = ctypes.c_void_p()
    libcuda.call("cuCtxGetCurrent", ctypes.byref(current))
    assert current.value is None
    libcuda.call("cuCtxPushCurrent_v2", 1000)
    launch(0, (0, 0, 0))
    libcuda.call("cuCtxGetCurrent", ctypes.byref(current))
    assert current.value == 1000
    assert "context 1001" in libcuda.taken()[0]
    libcuda.leave()


def test_more_shared_memory_is_asked_for(libcuda: Libcuda) -> None:
    Launch(libcuda.function(0, b"1 0", "big", 96 << 10), (1, 1, 1), 32, 1, ())(0, (16,))
    assert f"shared {96 << 10}" in libcuda.taken()[-1]


def test_threads_share_a_launch(libcuda: Libcuda) -> None:
    launch = Launch(libcuda.function(0, b"2 0", "k"), (1, 1, 1), 32, 2, ())
    barrier = threading.Barrier(4)

    def many(number: int) -> None:
        barrier.wait()
        for i in range(200):
            launch(number, (1000 * number + i, 1000 * number + i))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(4)))
    lines = [line.split() for line in libcuda.taken() if line.startswith("launch")]
    assert len(lines) == 800
    for line in lines:
        stream, pointers = int(line[line.index("stream") + 1]), line[line.index("arguments") + 1 :]
        assert pointers[0] == pointers[1]
        assert int(pointers[0]) // 1000 == stream


def test_run_loads_code_once_and_passes_what_tensors_are(libcuda: Libcuda, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(cubins, "find", lambda *asked: found.append(asked) or cubins.Code("a test", b"3 2"))
    a, out = torch.zeros(4), torch.zeros(4)
    for _ in range(3):
        device.run(ADD, (1, 1, 1), 32, (a, None, out), 4, 5)
    assert found == [(ADD, Capability(9, 0))]
    line = f"launch add context 1000 stream 77 grid 1 1 1 threads 32 shared 0 arguments {a.data_ptr()} 0 {out.data_ptr()} 4 5"
    assert libcuda.taken() == ["retain 0", *[line] * 3]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (209, "CUDA driver, cuLaunchKernel.*CUDA_SUCCESS.*CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image.*another backend"),
        (1, "CUDA_ERROR_INVALID_VALUE$"),
        (12345, "error 12345$"),
    ],
)
def test_errors_of_the_driver_have_names_and_words(libcuda: Libcuda, status: int, said: str) -> None:
    launch = Launch(libcuda.function(0, b"1 0", "k"), (1, 1, 1), 32, 1, ())
    libcuda.library.fail_next(status)
    with pytest.raises(MachineError, match=f"(?s){said}"):
        launch(0, (0,))
    launch(0, (0,))


def test_code_that_is_none_and_a_driver_that_is_not_there(libcuda: Libcuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"(?s)cuModuleLoadData.*INVALID_IMAGE.*clear the cache"):
        libcuda.function(0, b"nothing", "k")
    with pytest.raises(MachineError, match=r"(?s)cuDeviceGet.*error 101"):
        libcuda.context(7)
    driver.driver.cache_clear()
    missing = "libnowhere.so.9.*the CUDA driver.*cannot open.*install the NVIDIA driver"
    for library, said in (("libnowhere.so.9", missing), ("libm.so.6", "undefined symbol")):
        monkeypatch.setattr(driver, "LIBRARY", library)
        with pytest.raises(MachineError, match=f"(?s){said}"):
            driver.driver()


@pytest.mark.parametrize(("kind", "cuda", "available", "said"), [
    ("cpu", "12.4", True, "the weight lies on cpu"), ("cuda", None, False, "built without CUDA"), ("cuda", "12.4", False, "no CUDA driver"),
])  # fmt: skip
def test_where_there_is_no_gpu(kind: str, cuda: str | None, available: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(Refusal, match=said):
        device.usable(kind)


def test_the_oldest_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(device, "capability", [Capability(9, 0), Capability(7, 5), Capability(8, 6)].__getitem__)
    assert device.usable("cuda") == (7, 5)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90a", "compute_80"])
def test_nvrtc_compiles_for_every_target(compiler: nvrtc.Nvrtc, store: Path, target: str) -> None:
    before = locale.getencoding()
    image = compiler.compile("add.cu", ADD.text, variant.headers(), target, ADD.options)
    # NVRTC by itself leaves the thread with ASCII.
    assert locale.getencoding() == before
    if target.startswith("sm_"):
        assert image[:4] == b"\x7fELF"
        assert b"add" in image
    else:
        assert b".target sm_80" in image
        assert b".entry add" in image


def test_the_compilers_log_is_in_the_message(compiler: nvrtc.Nvrtc, store: Path) -> None:
    with pytest.raises(
        MachineError, match=r'(?s)NVRTC \d+\.\d, add.cu for sm_80.*NVRTC_ERROR_COMPILATION.*identifier "HALF" is undefined'
    ):
        compiler.compile("add.cu", ADD.text, {"half.cuh": ""}, "sm_80", ADD.options)
    with pytest.raises(MachineError, match=r"(?s)for sm_33.*INVALID_OPTION"):
        compiler.compile("add.cu", ADD.text, variant.headers(), "sm_33", ADD.options)


def test_where_nvrtc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.so.13"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("no library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    twelve = [str(tmp_path / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"), "libnvrtc.so.12"]
    thirteen = [str(tmp_path / "nvidia/cu13/lib/libnvrtc.so.13"), "libnvrtc.so.13"]
    assert list(nvrtc._paths(13)) == thirteen + twelve
    assert list(nvrtc._paths(None)) == twelve + thirteen
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert nvrtc._torchs() == 13
    # By its bare name it is found once it is loaded.
    monkeypatch.setattr(nvrtc, "_paths", lambda first: twelve[:1])
    with pytest.raises(MachineError, match=r"(?s)libnvrtc.so.12.*it is not installed.*nvidia-cuda-nvrtc-cu12"):
        nvrtc.nvrtc.__wrapped__(12)
    with pytest.raises(MachineError, match=r"(?s)NVRTC, the compiler of CUDA.*file too short|invalid ELF"):
        nvrtc.Nvrtc(twelve[0])


@pytest.mark.parametrize(("capability", "wanted"), [
    ((7, 0), ()), ((7, 5), ("sm_75",)), ((8, 0), ("sm_80", "compute_80")), ((8, 6), ("sm_80", "compute_80")),
    ((8, 9), ("sm_89", "sm_80", "compute_80")), ((9, 0), ("sm_90a", "compute_80")), ((10, 0), ("compute_80",)), ((12, 0), ("compute_80",)),
])  # fmt: skip
def test_which_archives_a_gpu_takes(capability: tuple[int, int], wanted: tuple[str, ...]) -> None:
    assert cubins.targets(Capability(*capability)) == wanted


@pytest.mark.parametrize(("capability", "wanted"), [
    ((7, 5), "sm_75"), ((9, 0), "sm_90a"), ((8, 8), "compute_87"), ((10, 0), "compute_90"), ((12, 1), "compute_90"),
])  # fmt: skip
def test_what_nvrtc_compiles_for_a_gpu_that_it_may_not_know(capability: tuple[int, int], wanted: str) -> None:
    assert cubins._native(Capability(*capability), (75, 80, 86, 87, 89, 90)) == wanted


def test_an_archive_is_the_same_every_time_and_is_found(
    compiler: nvrtc.Nvrtc, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Variant("add", "two", ("-DMORE=2",))
    images = {ADD: b"one" * 100, other: b"two" * 100}
    cubins.pack("sm_80", "12.4", images)
    first = cubins.archive("sm_80").read_bytes()
    cubins.pack("sm_80", "12.4", dict(reversed(images.items())))
    assert cubins.archive("sm_80").read_bytes() == first
    assert all(entry.date_time[0] == 1980 for entry in zipfile.ZipFile(cubins.archive("sm_80")).infolist())
    monkeypatch.setattr(cubins, "nvrtc", None)
    assert cubins.find(other, Capability(8, 6)) == cubins.Code("sm_80.zip", b"two" * 100)
    assert cubins.origin(ADD, Capability(8, 9)) == "sm_80.zip"
    assert cubins.stale("sm_80", images) == []
    cubins.pack("compute_80", "12.4", {ADD: b"// text"})
    assert cubins.find(ADD, Capability(12, 0)) == cubins.Code("compute_80.zip", b"// text")


def test_code_of_other_sources_is_never_run(compiler: nvrtc.Nvrtc, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.pack("sm_80", "12.4", {ADD: b"old"})
    (store / "sources" / "half.cuh").write_text("#define HALF 0.25f\n")
    forget()
    assert cubins.stale("sm_80", [ADD]) == ["add-one was built from other sources"]
    assert cubins.origin(ADD, Capability(8, 0)) == f"NVRTC {compiler.version}"
    assert cubins.find(ADD, Capability(8, 0)).image[:4] == b"\x7fELF"
    # Other options under the same name neither; what is not there and not wanted is told as well.
    cubins.pack("sm_80", "12.4", {Variant("add", "one", ("-DMORE=1",)): b"old"})
    assert cubins.stale("sm_80", [ADD]) == ["add-one was built from other sources"]
    assert cubins.stale("sm_80", []) == ["add-one is not wanted"]
    assert cubins.stale("sm_89", [ADD]) == ["add-one is not there"]

    def none(major: int | None = None) -> nvrtc.Nvrtc:
        raise MachineError("NVRTC", "a library", "it is not installed", "install it")

    monkeypatch.setattr(cubins, "nvrtc", none)
    with pytest.raises(
        Refusal,
        match=r"no add-one for capability 8.0: sm_80.zip was built from other sources; compute_80.zip is not there; NVRTC: it is",
    ):
        cubins.origin(ADD, Capability(8, 0))
    with pytest.raises(MachineError, match=r"not installed"):
        cubins.find(ADD, Capability(8, 0))


def test_a_damaged_archive_is_told(store: Path) -> None:
    (store / "archives").mkdir()
    cubins.archive("sm_80").write_bytes(b"PK no archive")
    with pytest.raises(MachineError, match=r"(?s)sm_80.zip.*an archive of cubins.*not a zip.*install compress again"):
        cubins.find(ADD, Capability(8, 0))
    with pytest.raises(Refusal, match=r"no add-one for capability 8.0.*not a zip"):
        cubins.origin(ADD, Capability(8, 0))
    cubins.pack("sm_80", "12.4", {ADD: bytes(range(256)) * 8})
    whole = cubins.archive("sm_80").read_bytes()
    cubins.archive("sm_80").write_bytes(whole[:90] + bytes(8) + whole[98:])
    with pytest.raises(MachineError, match=r"(?s)sm_80.zip, add-one.cubin.*install compress again"):
        cubins.find(ADD, Capability(8, 0))


def test_what_nvrtc_made_is_kept(
    compiler: nvrtc.Nvrtc, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = []
    straight = nvrtc.Nvrtc.compile
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda *a: compiled.append(a[4]) or straight(*a))
    first = cubins.find(ADD, Capability(9, 0))
    assert first.origin == f"NVRTC {compiler.version}, sm_90a"
    assert cubins.find(ADD, Capability(9, 0)) == first
    assert cubins.find(ADD, Capability(8, 6)) != first
    assert compiled == ["sm_90a", "sm_86"]
    (place, _) = sorted((store / "cache" / "kernels").iterdir(), key=lambda path: path.read_bytes()[32:] != first.image)
    for damage in (b"", place.read_bytes()[:-1], place.read_bytes()[:40] + b"x" + place.read_bytes()[41:]):
        place.write_bytes(damage)
        with caplog.at_level(logging.WARNING, "compress"):
            assert cubins.find(ADD, Capability(9, 0)) == first
        assert caplog.records.pop().message == f"{place} is damaged and made anew"
    assert len(compiled) == 5
    keys = {
        ADD.key("sm_90a", "12.4"),
        ADD.key("sm_90a", "13.0"),
        ADD.key("sm_80", "12.4"),
        Variant("add", "one", ()).key("sm_80", "12.4"),
    }
    (store / "sources" / "add.cu").write_text(SOURCE + "\n")
    forget()
    assert len(keys | {ADD.key("sm_90a", "12.4")}) == 5


def test_a_cache_that_cannot_be_written_is_told(
    compiler: nvrtc.Nvrtc, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", "/proc/nowhere")
    with caplog.at_level(logging.WARNING, "compress"):
        assert cubins.find(ADD, Capability(8, 0)).image[:4] == b"\x7fELF"
    assert "set COMPRESS_CACHE to a folder that can be written" in caplog.text


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache.folder_of("kernels") == Path("/there/compress/kernels")
    monkeypatch.setenv("COMPRESS_CACHE", "/here")
    assert cache.folder_of("kernels") == Path("/here/kernels")


def _write_often(place: Path, letter: bytes) -> None:
    for _ in range(100):
        cubins._write(place, letter * 50_000)


def test_many_processes_write_one_entry(tmp_path: Path) -> None:
    place = tmp_path / "kernels" / "entry"
    _write_often(place, b"a")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(place, letter)) for letter in (b"b", b"c", b"d")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        held = cubins._read(place)
        assert held is not None
        assert len(held) == 50_000
        assert held == held[:1] * 50_000
        seen.add(held[:1])
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(seen) > 1
    assert list(place.parent.iterdir()) == [place]


def test_what_is_built_is_told_and_checked(
    compiler: nvrtc.Nvrtc, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "variants", lambda target: [ADD])
    monkeypatch.setattr(sys, "argv", ["build", "--check"])
    assert build.main() == 1
    assert f"{cubins.archive('sm_75')}: add-one is not there" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["build", "--jobs", "1"])
    assert build.main() == 0
    assert "sm_90a.zip: 1 kernels, 0.00 MB, NVRTC 12.4" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["build", "--check"])
    assert build.main() == 0
    assert cubins.find(ADD, Capability(9, 0)).origin == "sm_90a.zip"
    (store / "sources" / "add.cu").write_text("no C")
    forget()
    assert build.main() == 1
    monkeypatch.setattr(sys, "argv", ["build", "--jobs", "1"])
    assert build.main() == MachineError.exit_status
    assert "add.cu for sm_75" in capsys.readouterr().err


def test_the_sources_compile_for_every_target(compiler: nvrtc.Nvrtc) -> None:
    """One of each source for each target; all of them are built by `make cubins`."""
    for target in cubins.TARGETS:
        wanted = build.variants(target)
        for source in ("finish", "outliers", "expand", "skinny"):
            chosen = next(v for v in wanted if v.source == source)
            assert source.encode() in build.compiled(target, variant.headers(), chosen, chosen.text)


def test_archives_hold_what_they_should() -> None:
    """Every one of the sources, bfloat16 not for Turing, and no two of the same name."""
    for target in cubins.TARGETS:
        wanted = build.variants(target)
        assert len({str(v) for v in wanted}) == len(wanted)
        assert {v.source for v in wanted} == {"skinny", "expand", "finish", "outliers"}
        assert any("-DBF16=1" in v.defines for v in wanted) == (target != "sm_75")
        for count in (1, 2, 4):
            assert f"skinny-int4-p4-f16-f16-n{count}" in {str(v) for v in wanted}


def test_the_archives_that_are_shipped_are_of_these_sources() -> None:
    stale = [line for target in cubins.TARGETS for line in cubins.stale(target, build.variants(target))]
    assert not stale, f"make cubins: {few(stale)}"
    assert sum(cubins.archive(target).stat().st_size for target in cubins.TARGETS) <= 4e6
