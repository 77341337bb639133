"""Bench: one wrong command line at a time, typed as a user does, with all that it must not have done."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hub_server import Hub, serve
from support import run, tiny_llama

_PLAIN = {"COLUMNS": "1000", "NO_COLOR": "1", "TERM": "dumb"}
_BOX = re.compile(r"[\u2500-\u257f]")
"""Lines around the messages of the option parser."""
RTN = "run {model} {out} -p 'quantize.rtn(scheme=w4a16g32) | pack'"


@dataclass(frozen=True)
class Case:
    """A command line, what is made wrong before it, and what it must end with."""

    status: int
    said: tuple[str, ...]
    """Parts of the message."""
    argv: str = RTN
    """As in a shell; {model}, {out} and {work}, the folder of both, are filled in."""
    spoil: Callable[[Path], object] = lambda model: None
    """Makes the model, or files beside it, wrong."""
    base: str = "tiny"
    """The sound model: `tiny`, `sharded` (the same in several shards), `demo`, which has a tokenizer, or `gguf`, that as a file."""
    hub: Callable[[Hub, Path], object] | None = None
    """What stands on the Hub that the command line talks to; None for no Hub at all."""
    unsaid: str = "Traceback"
    """What must not be printed."""
    there_bytes: int | None = None
    """Memory of the machine, if it is not this one's."""


@dataclass(frozen=True)
class Outcome:
    """What a command line has ended with."""

    status: int
    text: str
    """All that was printed, in one line."""
    changed: list[str]
    """Files and folders that are new, gone, or other than before."""

    def wrong(self, case: Case) -> list[str]:
        """What is not as the case has it; empty where all is."""
        problems = [f"status {self.status}, not {case.status}"] if self.status != case.status else []
        problems += [f"not said: {part}" for part in case.said if part not in self.text]
        problems += [f"said: {word}" for word in (case.unsaid, "Traceback", "internal error") if word in self.text]
        problems += [f"changed: {path}" for path in self.changed]
        return problems

    @property
    def message(self) -> str:
        """The message without what was printed before it."""
        at = max(self.text.find("error: "), self.text.find("Error "))
        return self.text[max(at, 0) :]


class Bench:
    """Runs cases, each in a folder of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        import compress.demo

        self.folder = folder
        tiny_llama(folder / "sound" / "tiny")
        tiny_llama(folder / "sound" / "sharded", "60KB")
        shutil.copytree(Path(compress.demo.__file__).parent / "model", folder / "sound" / "demo")
        run(folder / "sound" / "demo", folder / "packed", "quantize.rtn(scheme=w4a16g32) | pack(format=gguf)")
        (folder / "sound" / "gguf").mkdir()
        shutil.move(folder / "packed" / "model.gguf", folder / "sound" / "gguf")

    def run(self, case: Case, name: str) -> Outcome:
        """Types the command line of `case`; what it leaves stays in the folder `name`."""
        work = self.folder / name
        model = shutil.copytree(self.folder / "sound" / case.base, work / "model")
        case.spoil(model)
        filled = {"{model}": str(model), "{out}": str(work / "out"), "{work}": str(work)}
        words = shlex.split(case.argv)
        for key, value in filled.items():
            words = [word.replace(key, value) for word in words]
        before = _tree(work)
        with _surroundings(work, case, self.folder / f"{name} cache"), contextlib.chdir(work):
            status, text = _type(words)
        after = _tree(work)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        return Outcome(status, text, changed)


def _tree(folder: Path) -> dict[str, bytes]:
    """Every path below a folder, with the bytes of files, the ends of links, and size and time of what is too large to read."""
    found = {}
    for path in folder.rglob("*"):
        kind = b"link" + os.fsencode(path.readlink()) if path.is_symlink() else b"folder"
        if not path.is_symlink() and path.is_file():
            status = path.stat()
            large = status.st_size > 1 << 26
            kind = f"{status.st_size} {status.st_mtime_ns}".encode() if large else path.read_bytes()
        found[str(path.relative_to(folder))] = kind
    return found


@contextlib.contextmanager
def _surroundings(work: Path, case: Case, cache: Path) -> Iterator[None]:
    """No Hub but the case's own, no token, an empty cache, wide lines without colour."""
    from huggingface_hub import constants

    from compress.pipeline import memory_check

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {**_PLAIN, "COMPRESS_CACHE": f"{cache} of compress"}))
        os.environ.pop("HF_TOKEN", None)
        settings = {"HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "no token"), "HF_HUB_OFFLINE": case.hub is None}
        if case.hub is not None:
            hub = stack.enter_context(serve())
            template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
            settings |= {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
            case.hub(hub, work / "model")
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(constants, name, value))
        if case.there_bytes is not None:
            stack.enter_context(mock.patch.object(memory_check, "machine_bytes", return_value=case.there_bytes))
        yield


def _type(words: list[str]) -> tuple[int, str]:
    """Exit status, and all that was printed, of the command `compress` with these words."""
    from compress.__main__ import main

    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["compress", *words]), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, " ".join(_BOX.sub(" ", said.getvalue()).split())
