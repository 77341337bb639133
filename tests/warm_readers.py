"""Readers' processes, each forked from one that has their libraries behind it.

They do what `verify` has them do; only the seconds that imports take are left out.

`with warm():` around calls of `verify`. Run by a reader's own interpreter, this file is the process that forks.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_TORCH = ("torch", "safetensors.torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
HEAVY = {
    "probe_vllm.py": (*_TORCH, "vllm", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"),
    "probe_transformers.py": (*_TORCH, "compressed_tensors"),
    "probe_peft.py": (*_TORCH, "peft"),
    "probe_gptqmodel.py": _TORCH,
    "probe_auto_gptq.py": _TORCH,
    "probe_mlx.py": _TORCH,
}


class _Forks:
    """A process that forks, one child after the other."""

    def __init__(self, python: str, heavy: tuple[str, ...], variables: dict[str, str]) -> None:
        command = [python, "-P", __file__, *heavy]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, text=True)

    def run(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("ended "):
            if not line:
                raise RuntimeError(f"what forks for a reader has ended with status {self.process.wait()}")
        return int(line.split()[1])


def end(forks: dict[str, _Forks]) -> None:
    """Ends the processes that fork."""
    while forks:
        forks.popitem()[1].process.communicate()


@contextmanager
def warm(forks: dict[str, _Forks] | None = None) -> Iterator[None]:
    """Has `verify` fork its readers where that is worth while; from the processes in `forks`, which it leaves there, if given."""
    from compress.evaluate import readers

    plain, own = readers._run, forks is None
    forks = {} if forks is None else forks

    def run(command: list[str], variables: dict[str, str], scratch: Path, log: Path, timeout_seconds: float) -> int | None:
        probe = Path(command[3]).name
        if probe not in HEAVY:
            return plain(command, variables, scratch, log, timeout_seconds)
        if probe not in forks:
            forks[probe] = _Forks(command[0], HEAVY[probe], variables)
        status = forks[probe].run(
            {"argv": command[2:], "env": variables, "cwd": str(scratch), "log": str(log), "seconds": int(timeout_seconds)}
        )
        return None if status == -signal.SIGALRM else status

    readers._run = run
    try:
        yield
    finally:
        readers._run = plain
        if own:
            end(forks)


def _child(request: dict[str, Any]) -> None:
    os.setsid()
    signal.alarm(request["seconds"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # Chosen by another TMPDIR, as libraries were imported.
    tempfile.tempdir = None
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    sys.argv = request["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    said = os.dup(1)
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status: Any = 1
            try:
                _child(json.loads(line))
            except SystemExit as end:
                status = end.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        os.write(said, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
