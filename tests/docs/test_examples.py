"""The scripts of examples/, as a user runs them; the pass among them in a tree of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import TEXT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def script(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What a script prints, line by line."""
    path = EXAMPLES / name
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    return capfd.readouterr().out.splitlines()


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        assert f'"{path.name}"' in here, path


def test_quantize(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    said = script("quantize.py", monkeypatch, capfd, demo_model, tmp_path / "out")
    assert "'transformed': 28" in said[0]
    assert said[1].startswith("1,837,312 bytes became ")


def test_stages_and_what_they_cost(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    texts, held_out = TEXT / "calibration.jsonl", TEXT / "evaluation.jsonl"
    *stages, bits = script("stages.py", monkeypatch, capfd, demo_model, tmp_path / "out", texts, held_out)
    names, kl = zip(*((line.split()[0], float(line.split()[2])) for line in stages), strict=True)
    assert names == ("2-prune.wanda", "3-quantize.gptq", "4-distill.logits")
    assert 0 < kl[2] < kl[1], "training lowers the KL"
    assert kl[0] < kl[1], "quantizing raises it"
    assert bits.endswith("bits per weight")


def test_generate(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import compress

    compress.run("quantize.rtn(scheme=w8a16) | pack(format=native)", demo_model, tmp_path / "out")
    said = "\n".join(script("generate.py", monkeypatch, capfd, tmp_path / "out", "def main"))
    assert said.startswith("def main")
    assert len(said) > len("def main")


def test_a_pass_is_one_file_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    """The tree with one more file in passes/: list, plan and run take it, and its command has its option."""
    site = tmp_path / "site" / "compress"
    site.mkdir(parents=True)
    for path in [*(ROOT / "compress").iterdir(), ROOT / "kernels", ROOT / "recipes"]:
        (site / path.name).symlink_to(path)
    shutil.copytree(ROOT / "passes", site / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLES / "clip.py", site / "passes")
    code = f"""
import sys
import compress
assert compress.__file__.startswith({str(site)!r}), compress.__file__
from compress.cli.app import build
for words in (["list"], ["plan", {str(tiny)!r}, "-p", "clip(deviations=2) | quantize.rtn(scheme=w4a16g32)"],
              ["clip", {str(tiny)!r}, "out", "--deviations", "2"]):
    sys.argv = ["compress", *words]
    build(words)(words, standalone_mode=False)
"""
    environment = {**os.environ, "PYTHONPATH": str(site.parent), "NO_COLOR": "1", "COLUMNS": "400"}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "clip: Clips entries of a matrix that lie too many standard deviations from its mean." in done.stdout
    assert "deviations (FLOAT, default: 4.0): standard deviations that an entry may lie" in done.stdout
    assert "14 of 14 weights" in done.stdout
