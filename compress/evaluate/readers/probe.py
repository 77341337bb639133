"""Probe: runs one reader in its own interpreter and saves its logits.

Run by path, with nothing of ours importable: python probe.py READER.py REQUEST.json. READER.py defines
`load(artifact, scratch, base, dtype, notes, trusted)`, which returns a function from ids to logits, or to a pair: some tokens'
log-probabilities, and which tokens these are. `scratch` is removed later. Where there is no torch, ids and logits are arrays of
numpy, and the number of threads is in OMP_NUM_THREADS.
"""

from __future__ import annotations

import json
import runpy
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def by_torch(request: dict[str, Any], load: Callable[[Any], Any]) -> None:
    """Writes the logits of a reader that computes with torch."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(request["threads"])
    forward = load(getattr(torch, request["dtype"]))
    ids = load_file(request["ids"])["input_ids"]
    with torch.inference_mode():
        rows = [given if isinstance(given := forward(row[None]), tuple) else (given,) for row in ids]
    logits, *tokens = map(torch.cat, zip(*rows, strict=True))
    found = {"logits": logits.float().cpu().contiguous(), **({"tokens": tokens[0].contiguous()} if tokens else {})}
    save_file(found, request["out"])


def by_numpy(request: dict[str, Any], load: Callable[[Any], Any]) -> None:
    """Writes the logits of a reader without torch."""
    import os

    import numpy
    from safetensors.numpy import load_file, save_file

    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    forward = load(request["dtype"])
    rows = [forward(row[None]) for row in load_file(request["ids"])["input_ids"]]
    save_file({"logits": numpy.ascontiguousarray(numpy.concatenate(rows), dtype=numpy.float32)}, request["out"])


def main(script: str, request_file: str) -> int:
    request: dict[str, Any] = json.loads(Path(request_file).read_text())
    answer: dict[str, Any] = {"notes": [], "versions": {}}
    try:
        for name in request["packages"]:
            try:
                answer["versions"][name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        base = Path(request["base"]) if request["base"] else None
        load = runpy.run_path(script)["load"]
        places = Path(request["artifact"]), Path(request["scratch"]), base
        compute = by_torch if find_spec("torch") is not None else by_numpy
        compute(request, lambda dtype: load(*places, dtype, answer["notes"], request["trusted"]))
    except BaseException as error:
        traceback.print_exc()
        answer["error"] = {"kind": type(error).__name__, "text": str(error), "missing": isinstance(error, ImportError)}
    Path(request["answer"]).write_text(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
