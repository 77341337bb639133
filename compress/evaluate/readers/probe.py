"""Probe: runs one reader in its own interpreter and saves its logits.

Run by path, with nothing of ours importable: python probe.py READER.py REQUEST.json. READER.py defines
`load(artifact, scratch, base, dtype, notes, trusted)`, which returns a function from ids to logits. `scratch` is removed later.
"""

from __future__ import annotations

import json
import runpy
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any


def main(script: str, request_file: str) -> int:
    request: dict[str, Any] = json.loads(Path(request_file).read_text())
    answer: dict[str, Any] = {"notes": [], "versions": {}}
    try:
        import torch
        from safetensors.torch import load_file, save_file

        torch.set_num_threads(request["threads"])
        for name in request["packages"]:
            try:
                answer["versions"][name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        base = Path(request["base"]) if request["base"] else None
        load = runpy.run_path(script)["load"]
        dtype = getattr(torch, request["dtype"])
        places = Path(request["artifact"]), Path(request["scratch"]), base
        forward = load(*places, dtype, answer["notes"], request["trusted"])
        ids = load_file(request["ids"])["input_ids"]
        with torch.inference_mode():
            rows = [forward(row[None]).float().cpu() for row in ids]
        save_file({"logits": torch.cat(rows).contiguous()}, request["out"])
    except BaseException as error:
        traceback.print_exc()
        answer["error"] = {"kind": type(error).__name__, "text": str(error), "missing": isinstance(error, ImportError)}
    Path(request["answer"]).write_text(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
