"""bench --compile: compiled decoding beside the packed model, what compiling took, and what is said where it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from compress.cli.app import build
from compress.evaluate.bench import COMPILED, DECODE
from compress.runtime import compiled_step

COMPILE = ["--prompt", "8", "--new-tokens", "2", "--batch", "2", "--rounds", "1", "--device", "cpu", "--compile"]


@pytest.mark.parametrize("as_json", [True, False])
def test_compiled_code_stands_beside_the_packed_model(
    packed: Path, model: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled_step, "BACKEND", "eager")
    words = ["bench", str(packed), "--against", str(model), *COMPILE, *(["--json"] if as_json else [])]
    build(words)(words, standalone_mode=False)
    text = capsys.readouterr().out
    if as_json:
        speeds = json.loads(text)["speeds"]
        compiled = [(s["phase"], s["how"], s["compile_seconds"] > 0) for s in speeds if s["label"] == COMPILED]
        assert compiled == [(DECODE, "compiled", True)]
        assert {s["compile_seconds"] for s in speeds if s["label"] != COMPILED} == {None}
        return
    rows = [line.split() for line in text.splitlines() if line.startswith("    2  ")]
    assert [row[1:3] for row in rows] == [["prompt", rows[0][2]], ["decode", rows[1][2]], ["decode,", "compiled"]]
    assert [row[-1] for row in rows] == ["eager", "eager", "compiled"]
    assert re.search(r"^compiled: in \d+\.\d s for 2 prompts; a token is \d+\.\d\dx as fast as without$", text, re.MULTILINE)


def test_what_does_not_compile_is_timed_as_it_is(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled_step, "BACKEND", broken)
    words = ["bench", str(packed), *COMPILE]
    build(words)(words, standalone_mode=False)
    assert "eager, for compiling gave: RuntimeError: no compiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"), [(["x", "--device", "cuda"], "a CUDA graph"), (["--kernels"], "none beside --kernels")]
)
def test_compiling_needs_a_model_on_the_cpu(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--compile", *more]
    with pytest.raises(SystemExit) as stopped:
        build(words)(words, standalone_mode=False)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
