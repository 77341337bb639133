"""A disk that fills up, places that cannot be written, files that vanish: a message, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import RECIPES, Ran, Server, same

from compress.pipeline.output_paths import steps_folder
from support import few, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("places") / "model", num_hidden_layers=8)


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """A file system of its own; skips where that is not allowed."""
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", *options, str(place)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def said(ran: Ran) -> str:
    return "\n".join(ran.words)


@pytest.mark.parametrize("kind", few(RECIPES, "sweep", "train"))
def test_a_disk_that_fills_up_while_it_runs(kind: str, model: Path, server: Server, tmp_path: Path) -> None:
    """The rest of a small disk is taken by somebody else in the middle; with room again, the same command goes on."""
    assert server.run(["run", model, tmp_path / "reference", "-p", RECIPES[kind], "--quiet"]).status == 0
    # When the first step begins, all but a few bytes are taken.
    before = """
import compress.pipeline.run as p, os
begin, left = p.run_step, [{left}]
def fill(*args):
    free = os.statvfs({place!r}).f_bavail * os.statvfs({place!r}).f_bsize
    if not os.path.exists({place!r} + "/taken"):
        with open({place!r} + "/taken", "wb") as file:
            file.write(b"x" * max(0, free - left[0]))
    return begin(*args)
p.run_step = fill
"""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256m", "none") as place:
        for left in (0, 8192, 70_000, 300_000) if kind == "stream" else (8192, 300_000):
            command = ["run", model, place / "out", "-p", RECIPES[kind]]
            ran = server.run(command, before=before.format(left=left, place=str(place)))
            assert ran.status == 6, (left, ran.status, said(ran))
            assert "No space left on device" in said(ran)
            assert "free some space" in said(ran)
            assert not (place / "out").exists()
            (place / "taken").unlink()
        ran = server.run(command)
        assert ran.status == 0, said(ran)
        assert same(place / "out", tmp_path / "reference") == []


def test_too_small_a_disk_is_told_before_any_work(model: Path, server: Server, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "none") as place:
        ran = server.run(["run", model, place / "out", "-p", RECIPES["stream"]])
        assert ran.status == 6
        assert "bytes free for 2 steps" in said(ran)
        assert list(place.iterdir()) == []


def test_read_only_places(model: Path, server: Server, tmp_path: Path) -> None:
    """A source may be read-only; a place to write may not."""
    shutil.copytree(model, tmp_path / "copy")
    with mounted(tmp_path / "source", "--bind", "-o", "ro", str(tmp_path / "copy")) as source:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(source)], check=True)
        assert server.run(["run", source, tmp_path / "out", "-p", RECIPES["stream"], "--quiet"]).status == 0
        ran = server.run(["run", model, source / "out", "-p", RECIPES["stream"]])
        assert ran.status == 6
        assert "Read-only file system" in said(ran)
        assert "do:" in said(ran)


VANISH = """
import compress.pipeline.run as p, os, shutil
begin = p.run_step
def gone(step, *args):
    if step.name == {step!r}:
        shutil.rmtree({place!r}) if os.path.isdir({place!r}) else os.unlink({place!r})
    return begin(step, *args)
p.run_step = gone
"""


@pytest.mark.parametrize("name", few(["generation_config.json", "config.json", "model.safetensors"], "model.safetensors"))
def test_a_file_of_the_source_that_vanishes(name: str, model: Path, server: Server, tmp_path: Path) -> None:
    """Open files stay; one that is still to be read is named, and with it back the run goes on."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)
    assert server.run(["run", source, tmp_path / "reference", "-p", RECIPES["sweep"], "--quiet"]).status == 0
    before = VANISH.format(step="quantize.gptq", place=str(source / name))
    ran = server.run(["run", source, out, "-p", RECIPES["sweep"]], before=before)
    if ran.status:
        assert ran.status == 3, said(ran)
        assert name in said(ran)
        assert not out.exists()
        shutil.copyfile(model / name, source / name)
        assert server.run(["run", source, out, "-p", RECIPES["sweep"], "--quiet"]).status == 0
    assert same(out, tmp_path / "reference") == []


def _steps(out: Path) -> Path:
    return steps_folder(out)


@pytest.mark.parametrize("which", [
    pytest.param(_steps, id="all steps", marks=pytest.mark.slow),
    pytest.param(lambda out: next(_steps(out).glob("2-*")), id="the step before"),
])  # fmt: skip
def test_steps_that_vanish(which: Callable[[Path], Path], model: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert server.run(["run", model, tmp_path / "reference", "-p", RECIPES["sweep"], "--quiet"]).status == 0
    assert server.run(["run", model, out, "-p", RECIPES["sweep"], "--quiet"]).status == 0
    place = str(which(out))
    shutil.rmtree(out)
    ran = server.run(["run", model, out, "-p", RECIPES["sweep"]], before=VANISH.format(step="pack", place=place))
    if ran.status:
        assert ran.status in (3, 6), said(ran)
        assert "internal" not in said(ran)
        again: Any = server.run(["run", model, out, "-p", RECIPES["sweep"]])
        assert again.status == 0, said(again)
    assert same(out, tmp_path / "reference") == []
