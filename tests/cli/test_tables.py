"""Tables as they are read in a terminal of 80 columns: whole, in lines that fit, with commands that can be copied."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from compress.cli import console
from compress.cli.app import build
from support import run

DEEP = "a-folder-with-a-long-name/and-another-one-below-it"
RECIPE = "calibrate(data={data}, samples=4, length=64) | quantize.gptq(scheme=w4a16g32, ragged=divide, outliers=0.005) | pack(format=native)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model below folders with long names, its artifact, and text to calibrate and to measure on."""
    import shutil

    import compress.demo

    home = Path(compress.demo.__file__).parent
    folder = tmp_path_factory.mktemp("tables") / DEEP
    shutil.copytree(home / "model", folder / "model")
    shutil.copyfile(home / "text" / "evaluation.jsonl", folder / "text.jsonl")
    line = RECIPE.format(data=f"'{folder / 'text.jsonl'}'")
    run(folder / "model", folder / "out", line)
    return folder


@pytest.fixture
def typed(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Types a command line in a terminal of 80 columns, in the folder of the model."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(place)

    def type_(*words: str) -> str:
        build(words)(words, standalone_mode=False)
        return capsys.readouterr().out

    return type_


VERBS = {
    "plan": ["plan", "model", "-p", RECIPE.format(data=f"'/{DEEP}/texts.jsonl'")],
    "plan --layers": ["plan", "model", "--layers", "-p", RECIPE.format(data="t.jsonl")],
    "plan of a recipe that is open": ["plan", "model", "five_stages"],
    "show": ["show", "out"],
    "show --layers": ["show", "out", "--layers"],
    "show --details": ["show", "out", "--details"],
    "doctor": ["doctor", "--device", "cpu"],
    "doctor --details": ["doctor", "--device", "cpu", "--details"],
    "doctor of an artifact": ["doctor", "out", "--device", "cpu"],
    "formats ls": ["formats", "ls"],
    "formats ls --details": ["formats", "ls", "--details"],
    "formats ls of a scheme": ["formats", "ls", "--scheme", "w4a16g128-asym"],
    "eval": ["eval", "out", "--against", "model", "--data", "text.jsonl", "--tokens", "256", "--length", "64"],
    "bench": ["bench", "out", "--against", "model", "--prompt", "8", "--new-tokens", "2", "--batch", "1,32", "--device", "cpu"],
    "diff": ["diff", "model", "out"],
    "diff --details": ["diff", "model", "out", "--details", "--worst"],
    "recipes ls": ["recipes", "ls"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_line_is_wider_than_the_terminal(verb: str, typed) -> None:
    said = typed(*VERBS[verb])
    assert [line for line in said.splitlines() if len(line) > 80] == []
    # What is to be copied stands in one line, and so does each backquote's fellow.
    assert [line for line in said.splitlines() if line.count("`") % 2] == []
    heads = [line for line in said.splitlines() if re.fullmatch(r"-+(  -+)*", line)]
    assert heads or verb.startswith(("doctor of", "recipes"))


def test_commands_to_copy_are_whole_however_long(tmp_path: Path, typed) -> None:
    out = tmp_path / DEEP / "an-artifact-with-a-name-of-its-own"
    out.parent.mkdir(parents=True)
    said = typed("run", "model", str(out), "-p", "quantize.rtn(scheme=w4a16g32, ragged=divide) | pack(format=native)")
    assert f"next:     compress show {out}" in said.splitlines()
    assert f"clean:    compress clean {out}" in said.splitlines()


def test_steps_have_short_names_and_whole_texts_on_request(typed) -> None:
    said = typed(*VERBS["plan"])
    rows = [line.split() for line in said.splitlines() if re.match(r" +\d  ", line)]
    assert [row[:3] for row in rows] == [["1", "calibrate", "-"], ["2", "quantize.gptq", "28/28"], ["3", "pack", "28/28"]]
    assert DEEP not in said
    assert f"'/{DEEP}/texts.jsonl'".strip("'") in typed(*VERBS["plan"], "--details")


def test_every_column_is_told_of(typed) -> None:
    told = {
        "plan": ("weights:", "bits/weight:", "over all:"),
        "show": ("bits:", "weight error: |W-W'|/|W|", "output error:"),
        "diff": ("A, B:", "weight error: |A-B|/|A|"),
        "eval": ("+-: the standard error",),
        "bench": ("tokens a second", "ratio: of medians"),
    }
    for verb, words in told.items():
        said = " ".join(typed(*VERBS[verb]).split())
        assert "columns: " in said
        for word in words:
            assert word in said, (verb, word)


def test_reasons_are_grouped_and_only_on_request(typed) -> None:
    for verb in ("doctor", "formats ls"):
        plain, whole = typed(*VERBS[verb]), typed(*VERBS[f"{verb} --details"])
        assert "[1]" not in plain + whole
        assert "--details" in plain
        assert len(whole) > len(plain)
    assert "simd: a Conv1D adds over its rows\n    for codes(w4a16g128), Conv1D" in typed(*VERBS["doctor --details"])
    found = typed(*VERBS["formats ls of a scheme"])
    assert "gptqmodel, yes: " in found
    assert "w2a16g64" not in found


def test_a_table_folds_texts_and_keeps_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("model.layers.0.self_attn.a_projection_with_a_long_name", "1,234,567"), ("b", "-")]
    wide = ["weight", "-" * 54, rows[0][0], "b"]
    narrow = ["weight", "-" * 29, "model.layers.0.self_attn.", "a_projection_with_a_long_name", "b"]
    for columns, firsts in (("200", wide), ("40", narrow)):
        monkeypatch.setenv("COLUMNS", columns)
        console.table(("weight", "bytes"), rows)
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said] == firsts
        assert said[2].endswith("  1,234,567")
        assert max(map(len, said)) <= int(columns)
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError()))
    console.text("a line that goes to a file is one line, whatever its length: " + "x" * 200)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_words_of_one_thing_are_one_word(typed) -> None:
    """--tokens are those of a text; what is generated are new tokens, in every verb; old names still work unseen."""
    for verb, has in {"eval": "--tokens", "generate": "--new-tokens", "bench": "--new-tokens"}.items():
        found = set(re.findall(r"--[a-z-]*tokens|--new\b(?!-)", typed(verb, "--help")))
        assert found == {has}
