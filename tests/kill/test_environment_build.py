"""A reader's environment whose build is killed at any moment is built again, whole."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from harness import ENVIRONMENT

from compress.evaluate.readers.environment import Environment, cache_folder, ensure, interpreter, packages

KILLS = 20


def wheel(folder: Path, name: str, files: int) -> None:
    """A wheel of many small files, so that installing it takes a while."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        for i in range(files):
            file.writestr(f"{name}/m{i}.py", f"VALUE = {i}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: by-hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        names = [*(f"{name}/m{i}.py" for i in range(files)), *(f"{info}/{part}" for part in ("METADATA", "WHEEL", "RECORD"))]
        file.writestr(f"{info}/RECORD", "".join(f"{each},,\n" for each in names))


def phase_of(line: str, phase: str) -> str:
    """What a build does from a line of its words on."""
    if line.startswith("building"):
        return "virtual environment"
    return "pip install" if "Processing" in line or "Looking in" in line else phase


@pytest.mark.slow
def test_killed_while_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Any]) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        wheel(tmp_path / "wheels", name, 200)
    calls = tuple(("--no-index", "--find-links", str(tmp_path / "wheels"), f"{name}==1.0") for name in ("first", "second"))
    wanted = Environment("fake", calls)
    code = f"from compress.evaluate.readers.environment import *; ensure({wanted!r}, lambda line: print(line, flush=True))"
    environment = {**ENVIRONMENT, "COMPRESS_CACHE": str(tmp_path / "cache")}
    chance, place = random.Random(0), cache_folder() / wanted.key()

    def build(kill_in: str, seconds: float) -> tuple[int, str, dict[str, float]]:
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        phase, began = "", {}
        for line in process.stdout:
            phase = phase_of(line, phase)
            began.setdefault(phase, time.monotonic())
            if phase == kill_in:
                time.sleep(chance.random() * seconds)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        return process.wait(), phase, {**began, "": time.monotonic()}

    status, _, began = build("", 0)
    assert status == 0
    reference = packages(interpreter(place))
    lengths = {
        "virtual environment": began["pip install"] - began["virtual environment"],
        "pip install": began[""] - began["pip install"],
    }
    for phase, seconds in lengths.items():
        kills, wrong = 0, 0
        while kills < KILLS:
            subprocess.run(["rm", "-rf", place], check=True)
            status, _, _ = build(phase, seconds)
            kills += status == -signal.SIGKILL
            # Whole or not there; what pip still does, it does to the folder that is thrown away.
            assert not place.exists() or packages(interpreter(place)) == reference
            python = ensure(wanted, lambda line: None) if kills % 5 == 0 else None
            if python is not None:
                said = "import first.m199, second.m199; print(first.m199.VALUE + second.m199.VALUE)"
                wrong += packages(python) != reference
                wrong += subprocess.run([python, "-c", said], capture_output=True, text=True).stdout.strip() != "398"
        assert not list(cache_folder().glob("*.tmp"))
        table.append(("environment", phase, str(kills), str(kills // 5), "the environment", str(wrong)))
        assert wrong == 0
