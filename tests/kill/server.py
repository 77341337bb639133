"""A child of the kill suite: has everything imported, and forks a `compress` for each command line that it is sent.

A request is a line of JSON: `argv`; `before`, code to run first; `phase`, where the run kills itself, or nothing. The answers are
the lines that the command prints, between `{"event": "forked", "pid": ...}` and `{"event": "ended", "status": ...}`. Nothing is computed before a fork, so no
thread is lost by it; each run starts in milliseconds and not in seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any, TextIO

HEAVY = (
    "accelerate", "matplotlib.backends.backend_svg", "torch", "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral", "transformers.models.auto.modeling_auto", "transformers.modeling_utils",
    "compress.cli.app", "compress.pipeline.run", "compress.checkpoint.source", "compress.executors.sweep", "compress.executors.observe", "compress.executors.train.loop", "compress.plots",
    "compress.executors.blocks", "compress.passes.distill.blocks", "compress.passes.quantize.learned", "compress.executors.slice", "compress.executors.rotate", "compress.passes.quantize.rotate", "compress.passes.prune.width", "compress.passes.prune.sheared",
    "compress.passes.quantize.gptq", "compress.passes.quantize.quik", "compress.passes.prune.wanda", "compress.passes.prune.sparsegpt", "compress.passes.distill.logits", "compress.corpus",
)  # fmt: skip


def phase_of(event: dict[str, Any]) -> str:
    """What a run does from this event on; empty where it goes on with what it did."""
    kind, step = event["event"], event.get("step", "")
    if kind == "progress":
        return "read" if step == "read" else f"{step}: work"
    names = {"forked": "start", "start": "enter", "plan": "plan", "begin": f"{step}: begin", "train": f"{step}: work"}
    return {**names, "publish": f"{step}: publish", "step": f"{event.get('name')}: published", "done": "end"}.get(kind, "")


class Last:
    """A standard output whose last event is the one that begins a phase: no kill from outside hits one of microseconds."""

    def __init__(self, stream: TextIO, phase: str) -> None:
        self.stream, self.phase = stream, phase

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self.stream.write(line)
            if line.startswith("{") and phase_of(json.loads(line)) == self.phase:
                self.stream.write("\n")
                self.stream.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def child(request: dict[str, object]) -> None:
    """Runs one command line, as the shell would."""
    sys.argv = ["compress", *request["argv"]]  # type: ignore[misc]
    exec(str(request.get("before", "")), {})
    if request.get("phase"):
        sys.stdout = Last(sys.stdout, str(request["phase"]))  # type: ignore[assignment]
    from compress.__main__ import main

    status = 0
    try:
        main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Answers requests until there are no more."""
    # Kills lose nothing that was written; what a power cut may lose is played through with what is asked of fsync.
    os.fsync = lambda descriptor: None
    for name in HEAVY:
        importlib.import_module(name)
    print(json.dumps({"event": "ready"}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            # Its words go where a terminal's would not mix with events.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            child(json.loads(line))
        print(json.dumps({"event": "forked", "pid": pid}), flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # What was killed may have left half a line.
        print("\n" + json.dumps({"event": "ended", "status": status}), flush=True)


if __name__ == "__main__":
    serve()
