"""Environment: built once, whole or not at all, apart from the user's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from compress.errors import MachineError
from compress.evaluate.readers import environment as environments
from compress.evaluate.readers.environment import Environment, cache_folder, clean_variables, ensure, packages


def wheel(folder: Path, name: str = "tinypack", version: str = "1.0") -> Path:
    """A wheel of one module, written by hand: nothing has to be fetched to install it."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: by-hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def fake(tmp_path: Path, cache: Path) -> Environment:
    home = wheel(tmp_path / "wheels").parent
    return Environment("fake", (("--no-index", "--find-links", str(home), "tinypack==1.0"),))


def test_it_is_built_once_and_apart_from_what_leaks_in(
    fake: Environment, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PYTHONUSERBASE", "VIRTUAL_ENV", "PIP_CACHE_DIR"):
        monkeypatch.setenv(name, str(elsewhere))
    monkeypatch.setenv("PIP_USER", "1")
    told: list[str] = []
    python = ensure(fake, told.append)
    assert any("Successfully installed tinypack-1.0" in line for line in told)
    assert python.is_relative_to(cache)
    assert not elsewhere.exists()
    code = "import tinypack, sys; print(tinypack.__file__, tinypack.VERSION, sys.prefix)"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=clean_variables()).stdout
    assert said.count(str(python.parents[1])) == 2
    assert packages(python)["tinypack"] == "1.0"
    assert sorted(path.suffix for path in cache.iterdir() if path.is_file()) == [".lock", ".log"]
    assert not list(cache.glob("*.tmp"))
    told.clear()
    assert ensure(fake, told.append) == python
    assert not told


def test_other_pins_are_another_environment(fake: Environment) -> None:
    others = [
        replace(fake, requirements=((), *fake.requirements)),
        replace(fake, variables=(("A", "1"),)),
        replace(fake, name="b"),
    ]
    assert len({fake.key(), *(other.key() for other in others)}) == 4


def test_what_cannot_be_installed_leaves_nothing(fake: Environment, cache: Path) -> None:
    bad = replace(fake, requirements=((*fake.requirements[0][:-1], "tinypack==9.9"),))
    with pytest.raises(MachineError) as caught:
        ensure(bad, lambda line: None)
    text = str(caught.value)
    assert "the environment of fake" in text
    assert "tinypack==9.9" in text
    log = next(cache.glob("*.log"))
    assert str(log) in text
    assert "No matching distribution" in log.read_text()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_what_is_installed_must_be_what_is_pinned(fake: Environment, tmp_path: Path, cache: Path) -> None:
    wheel(tmp_path / "wheels", version="2.0")
    both = replace(fake, requirements=(*fake.requirements, (*fake.requirements[0][:-1], "--upgrade", "tinypack")))
    with pytest.raises(MachineError, match=r"tinypack 2\.0, not 1\.0"):
        ensure(both, lambda line: None)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_full_disk_and_a_cache_that_cannot_be_written_are_told(fake: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="free some space"):
        ensure(replace(fake, needs_bytes=10**18), lambda line: None)
    monkeypatch.setenv("COMPRESS_CACHE", "/proc/nowhere")
    with pytest.raises(MachineError, match="COMPRESS_CACHE"):
        ensure(fake, lambda line: None)


def test_pip_that_installs_elsewhere_is_refused(fake: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(f"[install]\ntarget = {tmp_path / 'elsewhere'}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(MachineError, match="PIP_CONFIG_FILE"):
        ensure(fake, lambda line: None)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("said", "do"), [("OSError: [Errno 28] No space left on device", "space"), ("Connection refused", "network")]
)
def test_the_remedy_fits_what_pip_said(said: str, do: str) -> None:
    assert do in environments._remedy(said)


@pytest.mark.slow
def test_a_killed_build_is_done_again_and_two_do_not_mix(fake: Environment, tmp_path: Path, cache: Path) -> None:
    """The first one is killed in the middle of its second call of pip, whose build sleeps until it is let go."""
    package, begun, go = tmp_path / "slowpack", tmp_path / "begun", tmp_path / "go"
    package.mkdir()
    (package / "backend.py").write_text(
        textwrap.dedent(f"""
        import pathlib, shutil, time
        def build_wheel(folder, *rest):
            pathlib.Path({str(begun)!r}).touch()
            while not pathlib.Path({str(go)!r}).exists():
                time.sleep(0.05)
            return shutil.copy({str(wheel(tmp_path / "made", "slowpack"))!r}, folder).rsplit("/", 1)[-1]
        """)
    )
    toml = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (package / "pyproject.toml").write_text(f'{toml}[project]\nname = "slowpack"\nversion = "1.0"\n')
    slow = replace(fake, requirements=(*fake.requirements, ("--no-index", str(package))))
    code = f"from compress.evaluate.readers.environment import *; ensure({slow!r}, print)"
    first = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.DEVNULL)
    wait(begun.exists)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".tmp"]
    # pip outlives it and holds the lock: a second one waits until it has ended.
    second = subprocess.Popen([sys.executable, "-P", "-u", "-c", code], stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert "waiting" in second.stdout.readline()
    go.touch()
    rest = second.stdout.read()
    assert second.wait() == 0
    assert "building" in rest
    assert "built" in rest
    assert packages(ensure(slow, lambda line: pytest.fail(line)))["slowpack"] == "1.0"
    assert not list(cache.glob("*.tmp"))


def wait(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
