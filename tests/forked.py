"""Command lines as a user types them, each in a process forked from one that has torch and transformers behind it.

A fork has a user's exit status, stdout and stderr, and nothing of the commands before it; only the seconds that imports take are
left out. What depends on those (what starts without torch, a folder that shadows ours) is for a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

HEAVY = (
    "torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "transformers.generation.utils", "transformers.quantizers.auto", "compress.cli.app", "compress.checkpoint.source", "compress.hf",
    "compress.layerwise.model", "compress.pipeline.run", "compress.evaluate.perplexity_kl", "compress.evaluate.verify",
    "compress.corpus", "compress.executors.stream", "compress.executors.sweep", "compress.executors.train.loop", "compress.plots",
    "accelerate.optimizer", "accelerate.scheduler", "matplotlib.backends.backend_svg", "matplotlib.pyplot",
)  # fmt: skip
ENVIRONMENT = {"PYTHONSAFEPATH": "1", "NO_COLOR": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


class Server:
    """The process that forks, with an environment; it ends with the pipe that it reads."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def compress(
        self, *arguments: Any, cwd: Path | None = None, ranks: int = 1, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """`compress ARGUMENTS` in `cwd`, where nobody is at the terminal; `ranks` processes as torchrun starts them.

        The status is the first that is not 0; what is printed is the first process's. Raises RuntimeError if the server is dead.
        """
        return self._run("", arguments, cwd, ranks, variables)

    def python(self, code: str, *arguments: Any, ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
        """Python's `-c CODE ARGUMENTS`."""
        return self._run(code, arguments, None, ranks, variables)

    def _run(
        self, code: str, arguments: tuple[Any, ...], cwd: Path | None, ranks: int, variables: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            places = {"cwd": str(cwd or Path.cwd()), "out": f"{folder}/out", "err": f"{folder}/err"}
            request = {"code": code, "argv": words, **places, "ranks": ranks, "variables": variables}
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the process that forks has ended: {self.process.wait()}")
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(["compress", *words], int(line), out, err)


@lru_cache(maxsize=1)
def _server() -> Server:
    """One for each process of tests."""
    return Server({**os.environ, **ENVIRONMENT})


def python(code: str, *arguments: Any, ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -c CODE ARGUMENTS`, as Server.python has it."""
    return _server().python(code, *arguments, ranks=ranks, **variables)


def compress(*arguments: Any, cwd: Path | None = None, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`compress ARGUMENTS`, as Server.compress has it."""
    return _server().compress(*arguments, cwd=cwd, ranks=ranks)


def _child(request: dict[str, Any], rank: int, port: int) -> None:
    os.chdir(request["cwd"])
    more = f".{rank}" if rank else ""
    if request["ranks"] > 1:
        size = str(request["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= request["variables"]
    out, err = request["out"] + more, request["err"] + more
    for number, name, how in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(name, how | (os.O_CREAT if number else 0), 0o600), number)
    sys.argv = ["-c" if request["code"] else "compress", *request["argv"]]
    from compress.__main__ import main

    status = 0
    try:
        if request["code"]:
            exec(request["code"], {"__name__": "__main__"})
        else:
            main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _draw() -> None:
    """What the first report of a process makes besides itself: classes of plotly as they are needed, and its script, gzipped."""
    from plotly import graph_objects

    from compress.report.page import _library

    marks = (graph_objects.Bar(marker={"color": "red"}), graph_objects.Heatmap(colorbar={"title": {"text": "x"}}))
    graph_objects.Figure([*marks, graph_objects.Waterfall()]).to_html(include_plotlyjs=False)
    _library()


def _serve() -> None:
    # What tests write need not outlive a power cut.
    os.fsync = lambda descriptor: None
    for name in HEAVY:
        importlib.import_module(name)
    _draw()
    for line in sys.stdin:
        request, pids = json.loads(line), []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(request["ranks"]):
            if not (pid := os.fork()):
                _child(request, rank, port)
            pids.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(next((status for status in statuses if status), 0), flush=True)


if __name__ == "__main__":
    _serve()
