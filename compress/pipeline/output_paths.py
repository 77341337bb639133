"""Output paths: where a run writes, its lock, its disk space, its kept steps.

OUT             the last step's checkpoint; a real copy, never a link into a source or cache
OUT.steps/      the steps before it, read-only, kept until `compress clean OUT`; and the lock. Shards may be hard links to those
                of another run's steps (reuse.py)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.checkpoint.reader import ADAPTER_CONFIG, Checkpoint
from compress.context import Context
from compress.contract.step_plan import Plan
from compress.errors import InputError, MachineError


def steps_folder(out: Path) -> Path:
    """The folder of the steps of `out`."""
    out = Path(os.path.abspath(out))
    return out.parent / f"{out.name}.steps"


def stem(number: int, name: str, identity: str) -> str:
    """The name of a step's directory."""
    return f"{number}-{name}-{identity[:8]}"


def placed(out: Path, source: Checkpoint) -> Path:
    """`out` as an absolute path. Raises InputError for a place where no run may write."""
    out = Path(os.path.abspath(out))
    if out.is_symlink():
        raise InputError(str(out), "a directory to make", "a link", "name the place itself")
    if not out.name or source.path.resolve() in out.resolve().parents:
        raise InputError(str(out), "a directory outside MODEL", "one inside it", "choose another OUT")
    return out


def based(texts: dict[str, str], out: Path) -> dict[str, str]:
    """The texts for `out`. An adapter's config names `out` as its base, for PEFT takes no path relative to the adapter."""
    if ADAPTER_CONFIG not in texts:
        return texts
    content = {**json.loads(texts[ADAPTER_CONFIG]), "base_model_name_or_path": str(out)}
    return {**texts, ADAPTER_CONFIG: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}


def check_disk(plan: Plan, out: Path) -> None:
    """Raises MachineError if the steps and the output would not fit on the disk."""
    parent = out.parent if out.parent.exists() else Path.cwd()
    kept = sum(f.stat().st_blocks * 512 for f in steps_folder(out).rglob("*") if f.is_file()) if steps_folder(out).is_dir() else 0
    free = shutil.disk_usage(parent).free + kept
    need = plan.disk_bytes + plan.scratch_bytes + (64 << 20)
    if need > free:
        raise MachineError(
            str(parent), f"{need:,} bytes free for {len(plan.steps)} steps", f"{free:,} bytes",
            "free some space, or choose an OUT on another disk",
        )  # fmt: skip


@contextmanager
def locked(out: Path, ctx: Context) -> Iterator[None]:
    """Holds OUT for this run. Raises MachineError if another run has it."""
    if not ctx.is_main:
        yield
        return
    folder = steps_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link, and never truncated: the file may belong to another program.
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        do = "choose an OUT in a place that you may write to, with no file or link named OUT.steps"
        raise MachineError(str(folder), "a place to write", error.strerror or str(error), do) from None
    with open(descriptor, "rb") as stream_:
        try:
            fcntl.flock(stream_, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended while we opened the lock has removed the file; our lock on it would exclude nobody.
            if not (folder / "lock").exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder / "lock")):
                raise BlockingIOError
        except BlockingIOError:
            raise MachineError(
                str(out),
                "an output that no other run is writing",
                "a run that holds its lock",
                "wait for it, or choose another OUT",
            ) from None
        except OSError as error:
            do = "choose an OUT on a file system that has them; Lustre has them with the mount option flock"
            expected = "a file system with locks, which keep a second run away"
            raise MachineError(str(folder), expected, error.strerror or str(error), do) from None
        try:
            yield
        finally:
            tidy(folder)


def tidy(folder: Path) -> None:
    """Removes a steps folder that holds nothing but the lock."""
    if {entry.name for entry in folder.iterdir()} <= {"lock"}:
        shutil.rmtree(folder, ignore_errors=True)


def clean(out: Path, ctx: Context) -> int:
    """Removes OUT's steps; returns the bytes freed."""
    folder = steps_folder(out)
    if not folder.is_dir():
        return 0
    with locked(out, ctx):
        return empty(folder)


def empty(folder: Path) -> int:
    """Removes everything in a steps folder but the lock, which is held; returns the bytes freed."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    for entry in folder.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    # A file that another run's steps link to stays on the disk.
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
