"""Runs `compress` in children that can be killed, and tells the phases of a run by its events."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from server import phase_of

from compress.pipeline import output_paths
from support import ready_inputs, tree

ENVIRONMENT = {
    **os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip

CALIBRATE = f"calibrate(data='{ready_inputs(16, 24)}', samples=16)"
RECIPES = {
    "stream": "quantize.rtn(scheme=w4a16g32) | pack",
    "sweep": f"{CALIBRATE} | quantize.gptq(scheme=w4a16g32) | pack",
    "train": f"{CALIBRATE} | distill.logits(epochs=1, batch=2, micro_batch=2, save_every=2) | quantize.rtn(scheme=w4a16g32) | pack",
    "slice": f"{CALIBRATE} | prune.width(ffn=64, refit=true)",
}
"""A pass of every driver, and pack."""


def two_domains() -> str:
    """Two files of ready inputs, whose shares follow losses; as options of a training pass."""
    folder, chance, paths = Path(tempfile.mkdtemp()), torch.Generator().manual_seed(0), []
    for top in (128, 40):
        paths.append(str(folder / f"ids-below-{top}.safetensors"))
        save_file({"input_ids": torch.randint(3, top, (12, 24), generator=chance)}, paths[-1])
    return f"data={paths}, loading=dynamic, held_out=48"


@dataclass
class Ran:
    """One run: its exit status, its events with the seconds at which they came, and where it was when it was killed."""

    status: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """Lines that are no events."""
    killed_in: str = ""

    def phases(self) -> dict[str, tuple[float, float]]:
        """Each phase with its begin and its length, in seconds."""
        found: dict[str, tuple[float, float]] = {}
        phase = ""
        for event, at in zip(self.events, self.seconds, strict=True):
            if (now := phase_of(event)) != phase and now:
                if phase:
                    found[phase] = (found[phase][0], at - found[phase][0])
                phase = now
                found.setdefault(now, (at, 0.0))
        return found

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in self.events if event["event"] == kind]


class Server:
    """A process that forks commands; see server.py."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("server.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )
        self.buffer = b""
        while self._line(None).get("event") != "ready":
            pass

    def _line(self, deadline: float | None) -> dict[str, Any]:
        """The next line as an event; `{}` at the deadline, and a line that is none under `words`."""
        assert self.process.stdout is not None
        while b"\n" not in self.buffer:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            # Not `select`, which takes no descriptor above 1,023.
            with selectors.DefaultSelector() as ready:
                ready.register(self.process.stdout, selectors.EVENT_READ)
                if not ready.select(wait):
                    return {}
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            assert piece, f"the server ended: {self.buffer!r}"
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            found = json.loads(line)
            return found if isinstance(found, dict) and "event" in found else {"words": line.decode()}
        except ValueError:
            return {"words": line.decode(errors="replace")}

    def run(
        self,
        argv: list[Any],
        phase: str = "",
        share: float = 0.0,
        seconds: float = 0.0,
        number: int = signal.SIGKILL,
        before: str = "",
        at_once: bool = False,
    ) -> Ran:
        """Runs a command line; sends it a signal in `phase`, `share * seconds` after that began.

        With `at_once` the run kills itself where the phase begins.
        """
        assert self.process.stdin is not None
        request = {"argv": [*map(str, argv)], "before": before, "phase": phase if at_once else ""}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        ran, pid, deadline, now, began = Ran(), 0, None, "", time.monotonic()
        while True:
            event = self._line(deadline)
            if not event:
                os.kill(pid, number)
                ran.killed_in, deadline = now, None
                continue
            if "words" in event:
                ran.words += [event["words"]] if event["words"] else []
                continue
            if event["event"] == "ended":
                ran.status = event["status"]
                ran.killed_in = phase if at_once and ran.status == -number else ran.killed_in
                return ran
            pid = event.get("pid", pid)
            ran.events.append(event)
            ran.seconds.append(time.monotonic() - began)
            now = phase_of(event) or now
            if now == phase and deadline is None and not ran.killed_in and not at_once:
                deadline = time.monotonic() + share * seconds

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def journal(out: Path) -> dict[str, set[str]]:
    """The weights that unfinished steps of `out` have journaled, by step."""
    found: dict[str, set[str]] = {}
    for file in output_paths.steps_folder(out).glob("*.tmp/.compress-journal.*"):
        step = file.parent.name.split("-")[1]
        for line in file.read_bytes().split(b"\n"):
            try:
                found.setdefault(step, set()).add(json.loads(line)["weight"])
            except ValueError:
                continue
    return found


def same(out: Path, reference: Path) -> list[str]:
    """Files that differ between two outputs, and what a finished run has left behind."""
    a, b = tree(out), tree(reference)
    left = (
        [path.name for path in output_paths.steps_folder(out).iterdir() if path.suffix == ".tmp"]
        if output_paths.steps_folder(out).is_dir()
        else []
    )
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)) + left
