"""A power cut: nothing is published before it is durable, and whatever a disk may have lost is made again.

What has not been brought to the disk by fsync may be gone, cut or zeros afterwards, and a rename may not have happened.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ENVIRONMENT, RECIPES, Server, same

from compress.pipeline.output_paths import steps_folder
from support import tiny_llama

CUTS = 25
CUT = """
import compress.checkpoint.writer, json, os
points, durable, moved = [0], [], []

def cut():
    points[0] += 1
    if points[0] == {at}:
        with open({log!r}, "w") as file:
            json.dump([durable, moved], file)
        os._exit(77)

def wrapped(name, real, note):
    def call(*args, **kwargs):
        cut()
        found = real(*args, **kwargs)
        note(*args)
        return found
    return call

def sync(descriptor):
    if os.path.isdir(place := os.readlink(f"/proc/self/fd/{{descriptor}}")):
        moved[:] = [pair for pair in moved if os.path.dirname(pair[1]) != place]
    status = os.fstat(descriptor)
    durable.append([status.st_ino, status.st_size, status.st_mtime_ns])

def move(old, new):
    if os.path.isdir(new):
        moved.append([os.fspath(old), os.fspath(new)])

nothing = lambda *args: None
calls = {{"fsync": sync, "rename": move, "replace": nothing, "unlink": nothing, "pwrite": nothing, "chmod": nothing}}
for name, note in calls.items():
    setattr(os, name, wrapped(name, getattr(os, name), note))
compress.checkpoint.writer.Writer.record = wrapped("record", compress.checkpoint.writer.Writer.record, nothing)
"""
"""Ends the process at its `at`-th operation, and logs what is durable then, and which renames may yet be lost."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("power") / "model", max_shard_size="300KB", num_hidden_layers=4)


def lose(out: Path, log: Path, chance: random.Random) -> int:
    """What a disk may have lost; returns how many files were hit."""
    durable, moved = json.loads(log.read_text())
    for old, new in moved:
        if chance.random() < 0.5:
            os.rename(new, old)
    kept, hit = {tuple(entry) for entry in durable}, 0
    files = [*steps_folder(out).rglob("*"), *(out.rglob("*") if out.is_dir() else ())]
    for path in files:
        status = path.stat()
        if not path.is_file() or (status.st_ino, status.st_size, status.st_mtime_ns) in kept:
            continue
        damage = chance.choice(("nothing", "gone", "empty", "cut", "zeros"))
        hit += damage != "nothing"
        path.chmod(0o644)
        if damage == "gone":
            path.unlink()
        elif damage in ("empty", "cut"):
            os.truncate(path, 0 if damage == "empty" else status.st_size // 2)
        elif damage == "zeros":
            with open(path, "r+b") as file:
                file.seek(status.st_size // 2)
                file.write(bytes(status.st_size - status.st_size // 2))
    return hit


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_whatever_a_power_cut_loses_is_made_again(kind: str, model: Path, server: Server, tmp_path: Path, table: list) -> None:
    command, out, log = (
        ["run", model, tmp_path / "out", "-p", RECIPES[kind], "--dtype", "float32"],
        tmp_path / "out",
        tmp_path / "log",
    )
    assert server.run([*command[:2], tmp_path / "reference", *command[3:]]).status == 0
    chance, hits, cuts, differences = random.Random(kind), 0, 0, 0
    most = 1 << 10
    while cuts < CUTS:
        ran = server.run(command, before=CUT.format(at=chance.randrange(1, most), log=str(log)))
        if ran.status == 0:
            most = max(2, most // 2)
        else:
            assert ran.status == 77, (ran.status, ran.words)
            cuts += 1
            hits += lose(out, log, chance)
            ran = server.run(command)
            assert ran.status == 0, (ran.status, ran.words)
        differences += len(same(out, tmp_path / "reference"))
        shutil.rmtree(out)
        shutil.rmtree(steps_folder(out), ignore_errors=True)
    assert hits > CUTS
    assert differences == 0
    table.append((kind, "power cut, any operation", str(cuts), f"{hits} files hit", "what was lost", str(differences)))


CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\)\s+= ")
DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")
WRITES = ("write", "pwrite64", "copy_file_range", "ftruncate", "writev", "pwritev")


def whole_calls(text: str) -> Iterator[str]:
    """Lines of strace; a call that another thread's has cut in two comes where it ends."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        pid, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>")
        else:
            yield re.sub(r"^\d+ +<\.\.\. \w+ resumed>", lambda _, pid=pid: begun.pop(pid, ""), line)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not here")
def test_what_the_system_is_asked_for_and_in_which_order(model: Path, tmp_path: Path) -> None:
    """Each file is synced after its last write, then its directory, then the rename, then the directory above."""
    out, log = tmp_path / "out", tmp_path / "log"
    calls = f"trace={','.join((*WRITES, 'fsync', 'fdatasync', 'rename', 'renameat', 'renameat2'))}"
    run = [sys.executable, "-m", "compress", "run", model, out, "-p", RECIPES["stream"], "--quiet"]
    done = subprocess.run(
        ["strace", "-f", "-y", "-s", "1", "-o", log, "-e", calls, *run], env=ENVIRONMENT, capture_output=True, text=True
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    dirty: set[str] = set()
    synced, published = [], []
    for line in whole_calls(log.read_text()):
        if (match := CALL.match(line)) is None:
            continue
        name, arguments = match[1], match[2]
        if name.startswith("rename"):
            old, new = re.findall(r'"([^"]*)"', arguments)
            if not new.startswith(str(tmp_path)):
                continue
            inside = [path for path in dirty if path.startswith(f"{old}/")]
            assert inside == [], f"renamed before it was durable: {inside}"
            assert synced[-1] == old, "the directory's own entries come last"
            published.append(new)
        elif (place := DESCRIPTOR.match(arguments)) is not None and place[1].startswith(str(tmp_path)):
            # copy_file_range writes to its third argument.
            path = re.findall(r"\d+<([^>]*)>", arguments)[-1] if name == "copy_file_range" else place[1]
            if name in WRITES:
                dirty.add(path)
            else:
                dirty.discard(path)
                synced.append(path)
                if published and path == str(Path(published[-1]).parent):
                    published[-1] = f"{published[-1]} for good"
    # A card or a report that is lost is written again, by what is there for good.
    about = [entry for entry in published if entry.endswith(("/README.md", "/bits.svg", ".report.html"))]
    kept = [entry for entry in published if entry not in about]
    assert [entry.endswith("for good") for entry in kept] == [True, True]
    assert kept[-1].startswith(str(out))
    assert published == [*kept, *about]
