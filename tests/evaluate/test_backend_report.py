"""doctor: its answers are the backends' own, for every kind of weight, and what a model that is loaded really has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compress
from compress.cli.app import build
from compress.errors import Refusal
from compress.evaluate import backend_report
from compress.kernels.cpu.library import library
from compress.kernels.cuda.cubins import Capability
from compress.kernels.dispatch import BACKENDS, load_backend, refuse
from compress.runtime import artifact
from compress.spec.scheme import BITS, Scheme
from families import build as build_family
from support import run, tiny_llama

NATIVE = "pack(format=native)"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    run(tiny_llama(folder / "model"), folder / "out", f"quantize.rtn(scheme=w4a16g32) | {NATIVE}")
    return folder / "out"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the verb prints."""
    words = ["doctor", *map(str, arguments)]
    build(words)(words, standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", backend_report.DTYPES)
def test_each_answer_is_the_first_backend_that_does_not_refuse(dtype: str, device: str) -> None:
    for use in backend_report.families(dtype, device):
        found, backend, reasons = backend_report.answer(use), None, {}
        for name in BACKENDS:
            try:
                refuse(load_backend(name), use.work)
                backend = name
                break
            except Refusal as refusal:
                reasons[name] = refusal.reason
        assert (found.backend, found.passed_over) == (backend, reasons)
        assert backend is not None
        assert all(reasons.values())


def test_every_kind_of_scheme_is_asked_about() -> None:
    schemes = [use.work.state.scheme for use in backend_report.families("bfloat16", "cpu")]
    kinds = {(s.grid, s.bits, s.scales, s.symmetric) for s in schemes if s is not None}
    assert kinds >= {("int", bits, "row", symmetric) for bits in BITS for symmetric in (True, False)}
    assert any(s is not None and s.minimum for s in schemes)
    texts = ["nf2", "nf3", "nf4", "fp4", "e3m0", "mxfp4", "nvfp4", "fp8", "fp8-e5m2", "fp8-tensor", "fp8-block"]
    assert kinds >= {(s.grid, s.bits, s.scales, True) for s in map(Scheme.parse, texts)}
    assert {s.inputs for s in schemes if s is not None} == {"", "int8", "int4", "int4-asym", "fp8", "mxfp4", "nvfp4"}
    what = " ".join(use.what for use in backend_report.families("bfloat16", "cpu"))
    for word in (
        "outliers",
        "columns(256)",
        "lowrank(r16)",
        "lowrank(r16-int8)",
        "masked(2:4)",
        "embedding",
        "Conv1D",
        "experts",
    ):
        assert word in what


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral", "gpt_oss", "t5"])
def test_it_says_what_a_model_that_is_loaded_has(name: str, dtype: str, tmp_path: Path) -> None:
    experts = ", experts" if name in ("mixtral", "gpt_oss") else ""
    recipe = f"quantize.rtn(scheme=w4a16g32, targets=[linear, embeddings{experts}], ragged=channel)"
    run(build_family(name, tmp_path), tmp_path / "out", f"{recipe} | {NATIVE}")
    uses = backend_report.artifact_uses(compress.open_checkpoint(tmp_path / "out"), "cpu", dtype)
    told: dict[str | None, int] = {}
    for one in map(backend_report.answer, uses):
        told[one.backend] = told.get(one.backend, 0) + one.use.weights
    model = compress.load(tmp_path / "out", dtype)
    assert told == artifact.backends(model)
    held = {module.work for module in model.modules() if isinstance(module, artifact.PackedWeight)}
    assert {use.work for use in uses} == held


def test_it_prints_a_row_for_each_kind_and_each_reason_once_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--device", "cpu")
    assert "cpu:      " in text
    assert "passed over" not in text.partition("weights ")[2].partition("why:")[0]
    row = next(line for line in text.splitlines() if line.startswith("codes(nf4g64) "))
    assert row.split()[1:] == ["simd", "simd", "simd"]
    lines = said(capsys, "--device", "cpu", "--details").splitlines()
    why = lines.index("integers: it does not round activations to integers")
    assert "codes(nf4g64)" in " ".join(lines[why + 1 : why + 12])
    assert any(line.split() == ["simd:", *str(library()).split()] for line in lines)
    assert len(lines) < 115


def test_weights_of_an_artifact_are_counted(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, packed, "--device", "cpu")
    assert "14 weights codes(w4a16g32) bfloat16: simd" in text
    text = said(capsys, packed, "--device", "cpu", "--dtype", "float32")
    assert "14 weights codes(w4a16g32) float32: simd\n" in text
    assert "integers passed over: codes(w4a16g32) does not round activations to integers" in text
    text = said(capsys, packed, "--device", "cpu", "--backend", "int8pack")
    assert "14 weights codes(w4a16g32) bfloat16: nothing\n    int8pack passed over: w4a16g32 is not symmetric w8" in text
    found = json.loads(said(capsys, packed, "--device", "cpu", "--json"))
    assert sum(one["weights"] for one in found["answers"]) == 14
    assert {one["backend"] for one in found["answers"]} == {"simd"}
    assert found["machine"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dtype", "bf16"], 2, "one of auto, bfloat16"), (["--device", "gpu"], 2, "one of auto, cpu, cuda"),
        (["--backend", "int4"], 2, "did you mean"), (["{model}"], 3, "a dense one"), (["{missing}"], 3, ""),
    ],
)  # fmt: skip
def test_refusals(
    arguments: list[str], status: int, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        said(capsys, *(word.format(model=tiny, missing=tmp_path / "none") for word in arguments))
    assert stopped.value.code == status
    assert message in capsys.readouterr().err


def test_where_code_comes_from() -> None:
    assert "NVRTC" in backend_report.code(Capability(9, 0))
    machine = backend_report.machine()
    assert set(machine["code"]) == {gpu["capability"] for gpu in machine["gpus"]}
    assert backend_report.version("no-such-package") == "not installed"
