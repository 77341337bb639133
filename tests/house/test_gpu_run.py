"""tests/gpu/run.py: what it says without a GPU, of parts that hang or die, and of what did not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.kernels import bench as kernels

ROOT = Path(__file__).parents[2]


def gpu_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(ROOT / "tests" / "gpu" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run_and_that_is_no_success(tmp_path: Path) -> None:
    done = gpu_run("--out", str(tmp_path))
    assert done.returncode == 6
    assert "nothing was run" in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def runner() -> Iterator[Any]:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("gpu_run", ROOT / "tests" / "gpu" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_run"]


def test_what_did_not_fit_or_failed_is_told_and_is_no_success(runner: Any, tmp_path: Path) -> None:
    part, last = runner.Part("operator 1/1", [], tmp_path / "a.jsonl"), runner.Part("table", [], tmp_path / "t.jsonl")
    passed = {"test": "t.py::a", "outcome": "passed", "seconds": 1, "why": ""}
    part.log.write_text(json.dumps({"collected": ["t.py::a", "t.py::b"]}) + "\n" + json.dumps(passed) + '\n{"test": "t.p')
    row = kernels.facts(kernels.Row(64, 64, "codes(w4a16)", 1, "gpu", True, 1, 1e-3, (1e-3,), "graph"))
    last.log.write_text(json.dumps({"bandwidth": 1e9, "whence": "nominal"}) + "\n" + json.dumps({"row": row}) + "\n")
    found = runner.collected([part], last)
    assert found["unfinished"] == ["t.py::b"]
    assert not runner.sound(found)
    text = runner.report({**found, "device": "cuda", "missing": [], "seconds": 1, "machine": {"runs_on": "a GPU"}})
    assert "did not fit: t.py::b" in text
    assert "| t.py | 1 | 0 | 0 |" in text
    found["unfinished"] = []
    assert runner.sound(found)
    for wrong in ({"tests": [{**passed, "outcome": "failed"}]}, {"rows": []}, {"tests": []}, {"ended": {"a": "its time was up"}},
                  {"skipped_cases": ["64x64"]}, {"rows": [{**row, "fault": "off by 1"}]}):  # fmt: skip
        assert not runner.sound({**found, **wrong})


def test_a_part_that_hangs_dies_or_never_began_is_told(runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "part.py"
    script.write_text(
        "import sys, time\nprint('words', flush=True)\ntime.sleep(60 if sys.argv[2] == 'hang' else 0)\nsys.exit(9)\n"
    )
    monkeypatch.setattr(runner, "__file__", str(script))
    parts = [runner.Part(name, [name], tmp_path / f"{name}.jsonl") for name in ("hang", "die", "late")]
    runner._run(parts[:2], time.monotonic() + 3, together=2)
    runner._run(parts[2:], time.monotonic() - 1, together=1)
    assert [part.ended for part in parts] == ["its time was up", "status 9: words", "there was no time to begin it"]


def test_the_folders_are_imported_from_a_checkout_that_is_not_installed() -> None:
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", f)).lower()]
sys.argv = ["run.py"]
import runpy
names = runpy.run_path({str(ROOT / "tests" / "gpu" / "run.py")!r})
sys.meta_path.insert(0, names["Rooms"]())
import compress.kernels.native.packed, compress.passes.pack, compress.recipes
assert compress.kernels.__path__ == [{str(ROOT / "kernels")!r}], compress.kernels.__path__
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
