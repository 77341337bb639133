"""Command lines as a user types them, each in a process forked from one that has torch and transformers behind it.

A fork has a user's exit status, stdout and stderr, and nothing of the commands before it; only the seconds that imports take are
left out. What depends on those (what starts without torch, a folder that shadows ours) is for a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
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
)  # fmt: skip
ENVIRONMENT = {"PYTHONSAFEPATH": "1", "NO_COLOR": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[bytes]:
    """One for each process of tests; it ends with the pipe that it reads."""
    command = [sys.executable, "-P", __file__]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT}
    )


def compress(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`compress ARGUMENTS`, in `cwd`, where nobody is at the terminal."""
    server, words = _server(), [*map(str, arguments)]
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {"argv": words, "cwd": str(cwd or Path.cwd()), "out": f"{folder}/out", "err": f"{folder}/err"}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(["compress", *words], status, out, err)


def _child(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    for number, name, how in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY)):
        os.dup2(os.open(name, how | (os.O_CREAT if number else 0), 0o600), number)
    sys.argv = ["compress", *request["argv"]]
    from compress.__main__ import main

    status = 0
    try:
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


def _serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        if not (pid := os.fork()):
            _child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
