"""llama.cpp beside a packed model: its type by bits, its process, and what the command prints of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build
from compress.errors import FormatError, UsageError
from compress.evaluate import llama_cpp_speed
from compress.evaluate.bench import DECODE, PACKED, PROMPT, Settings
from compress.evaluate.llama_cpp_speed import NAME, TYPES, scheme_for, speeds
from compress.evaluate.readers.environment import cache_folder
from compress.runtime import artifact
from compress.spec.scheme import Scheme


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A script in the place of the one that times llama.cpp, and this interpreter in that of its environment."""
    monkeypatch.setattr(llama_cpp_speed, "ensure", lambda environment, tell: Path(sys.executable))
    monkeypatch.setattr(llama_cpp_speed, "HERE", tmp_path)
    script = tmp_path / "time_llama_cpp.py"
    script.write_text("""
import json, pathlib, sys
file, threads, prompt, new, rounds, seed = sys.argv[1:]
assert pathlib.Path(file).read_bytes()[:4] == b"GGUF"
print("it says something first")
print(json.dumps({"rates": {"prompt": [float(prompt)] * int(rounds), "decode": [float(new)] * int(rounds)}, "version": "1.2"}))
""")
    return script


def test_each_number_of_bits_has_a_type_of_gguf(packed: Path) -> None:
    assert {bits: Scheme.parse(text).bits for bits, text in TYPES.items()} == {bits: bits for bits in TYPES}
    assert scheme_for(artifact.load(packed)) == "w4a16g32"
    with pytest.raises(UsageError, match="a model in codes"):
        scheme_for(nn.Linear(2, 2))


def test_it_runs_in_a_process_of_its_own_on_a_file_of_its_own(model: Path, stand_in: Path) -> None:
    told: list[str] = []
    found = speeds(open_checkpoint(model), "w4a16g32", Settings(prompt=7, new=3, rounds=2), told.append)
    assert [(s.label, s.batch, s.phase, s.rates) for s in found] == [(NAME, 1, PROMPT, (7.0, 7.0)), (NAME, 1, DECODE, (3.0, 3.0))]
    assert "w4a16g32 in GGUF, by xllamacpp 1.2" in found[0].how
    assert told == ["packing model for llama.cpp in w4a16g32", "timing llama.cpp"]
    stand_in.write_text("import sys; sys.exit('it does not load the file: bad magic')")
    with pytest.raises(FormatError, match="bad magic"):
        speeds(open_checkpoint(model), "w4a16g32", Settings(prompt=7, new=3), told.append)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_it_beside_the_others(
    packed: Path, model: Path, stand_in: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(packed), "--against", str(model), "--prompt", "8", "--new-tokens", "2", "--batch", "1,2", "--peers"]
    words += ["--device", "cpu", *(["--json"] if as_json else [])]
    build(words)(words, standalone_mode=False)
    text = capsys.readouterr().out
    if as_json:
        assert {speed["label"] for speed in json.loads(text)["speeds"]} == {PACKED, "dense", NAME}
        return
    head = next(line for line in text.splitlines() if line.startswith("batch"))
    assert head.split() == ["batch", "phase", "packed", "dense", "ratio", "llama.cpp", "ratio", "how"]
    rows = [line for line in text.splitlines() if line.split()[1:2] in (["prompt"], ["decode"])]
    assert ["8.0 (8.0)" in rows[0], "2.0 (2.0)" in rows[1]] == [True, True]
    assert all(row.split()[-3:-1] == ["-", "-"] for row in rows[2:])
    assert "llama.cpp: w4a16g32 in GGUF, by xllamacpp 1.2" in text


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--peers"], "no --against"), (["--kernels", "--peers"], "none beside --kernels")],
)
def test_it_needs_the_dense_model(packed: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    words: Any = ["bench", *([] if "--kernels" in more else [str(packed)]), "--device", "cpu", *more]
    with pytest.raises(SystemExit) as stopped:
        build(words)(words, standalone_mode=False)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_llama_cpp_itself_is_timed(model: Path) -> None:
    if not list(cache_folder().glob("llama.cpp-*/environment.json")):
        pytest.skip("the environment of llama.cpp is not built (make readers)")
    found = speeds(open_checkpoint(model), "w4a16g32", Settings(prompt=20, new=5, rounds=2), print)
    assert all(len(one.rates) == 2 and min(one.rates) > 0 for one in found)
