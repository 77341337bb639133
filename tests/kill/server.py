"""A child of the kill suite: has everything imported, and forks a `compress` for each command line that it is sent.

A request is a line of JSON: `argv`, and `before`, code to run first. The answers are the lines that the command prints,
between `{"event": "forked", "pid": ...}` and `{"event": "ended", "status": ...}`. Nothing is computed before a fork, so no
thread is lost by it; each run starts in milliseconds and not in seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

HEAVY = (
    "accelerate", "matplotlib.backends.backend_svg", "torch", "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral", "transformers.models.auto.modeling_auto", "transformers.modeling_utils",
    "compress.cli.app", "compress.pipeline.run", "compress.checkpoint.source", "compress.executors.sweep", "compress.executors.observe", "compress.executors.train.loop", "compress.plots",
    "compress.executors.blocks", "compress.passes.distill.blocks", "compress.executors.slice", "compress.passes.prune.width", "compress.passes.prune.sheared",
    "compress.passes.quantize.gptq", "compress.passes.prune.wanda", "compress.passes.prune.sparsegpt", "compress.passes.distill.logits", "compress.corpus",
)  # fmt: skip


def child(request: dict[str, object]) -> None:
    """Runs one command line, as the shell would."""
    sys.argv = ["compress", *request["argv"]]  # type: ignore[misc]
    exec(str(request.get("before", "")), {})
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
