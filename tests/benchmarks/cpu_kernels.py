"""CPU kernels: products of six shapes in every scheme, beside torch's.

    python tests/benchmarks/cpu_kernels.py [--json recipes/cpu-kernels.json] [--page recipes/cpu-kernels.md]

A fresh process of `compress bench --kernels` for each backend times them one after another, with the dense product in the same
rounds, from memory that no cache holds. Two minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real.process import measure
from benchmarks.real.table import tell

COMPRESS = str(Path(sys.executable).with_name("compress"))
SHAPES = {
    "576x1536": "SmolLM2-135M's down_proj", "1536x576": "its gate_proj and up_proj", "2048x2048": "attention of 1.1 B parameters",
    "5632x2048": "their gate_proj and up_proj", "4096x4096": "attention of 7 B", "4096x14336": "down_proj of 8 B",
}  # fmt: skip
TOKENS, ROUNDS = (1, 8, 64, 512), 3
BACKENDS = {
    "simd": ("w2a16g64", "w3a16g64", "w4a16g64", "w8a16g64", "nf4g64", "mxfp4", "nvfp4", "fp8", "codes(w4a16g64)+masked(2:4)"),
    "integers": ("w4a8g64", "w8a8"),
    "int4pack": ("w4a16g64",),
}
COMPARED = "w4a16g64"
"""What times of one token are compared with."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args(arguments)
    found: dict[str, Any] = {"runs": []}
    for backend, schemes in BACKENDS.items():
        command = [
            COMPRESS, "bench", "--kernels", "--backend", backend, "--schemes", ",".join(schemes), "--shapes", ",".join(SHAPES),
            "--activations", ",".join(map(str, TOKENS)), "--rounds", str(ROUNDS), "--dtype", "bfloat16", "--json",
        ]  # fmt: skip
        tell(f"{backend}: {', '.join(schemes)}")
        with tempfile.TemporaryDirectory(prefix="compress-cpu-kernels-") as scratch:
            usage = measure(command, Path(scratch) / "log")
            if usage.status:
                print((Path(scratch) / "log").read_text(), file=sys.stderr)
                return usage.status
            timed = json.loads((Path(scratch) / "log.out").read_text())
        timed.pop("protocol")
        said = shlex.join(["compress", *command[1:]])
        found["runs"].append({"backend": backend, "command": said, "busy": usage.busy, **timed})
    text = "\n".join(page(found)) + "\n"
    print(text)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.page:
        asked.page.write_text(text)
    return 0


def page(found: dict[str, Any]) -> Iterator[str]:
    """Tables, as Markdown."""
    first = found["runs"][0]
    yield from (
        "# Products on CPUs, shape by shape", "",
        "bf16 activations by packed weights, from memory that no cache holds: the time of one token, the weight's bytes by it, the time",
        f"by that of {COMPARED}, and for some numbers of tokens the speed by that of torch's dense product in the same round. Written by",
        "`tests/benchmarks/cpu_kernels.py`; cpu-kernels.json has every round and every command.", "",
        "```sh", "python tests/benchmarks/cpu_kernels.py --json recipes/cpu-kernels.json --page recipes/cpu-kernels.md", "```",
    )  # fmt: skip
    for shape, where in SHAPES.items():
        yield from ("", f"## {shape.replace('x', ' x ')}: {where}", "")
        speeds = (f"{tokens} tokens" if tokens > 1 else "1 token" for tokens in TOKENS)
        head = ["", "1 token", "of the weight", f"of {COMPARED}", *speeds]
        yield "| " + " | ".join(head) + " |"
        yield "| " + " | ".join(["---", *["---:"] * (len(head) - 1)]) + " |"
        compared = _best(first, shape, f"codes({COMPARED})", 1, "simd")
        for run in found["runs"]:
            for scheme in BACKENDS[run["backend"]]:
                state = scheme if "(" in scheme else f"codes({scheme})"
                name = scheme.replace("codes(w4a16g64)+masked(2:4)", "2:4, w4a16g64")
                row = _row(run, shape, state, compared)
                yield "| " + " | ".join([name + " by torch's int4" * (run["backend"] == "int4pack"), *row]) + " |"
    yield ""
    copies = ", ".join(f"{run['peak_bandwidth'] / 1e9:.0f}" for run in found["runs"])
    yield f"Machine: {first['device']}; a copy of 256 MiB reads and writes {copies} GB/s, before each of the three runs."
    if any(run["busy"] for run in found["runs"]):
        yield "Other processes were at work."


def _row(run: dict[str, Any], shape: str, state: str, compared: float) -> Iterator[str]:
    ours = _best(run, shape, state, 1, run["backend"])
    size = next(row["weight_bytes"] for row in run["rows"] if row["state"] == state and _is(row, shape, 1, run["backend"]))
    yield from (f"{ours * 1e6:.0f} us", f"{size / ours / 1e9:.1f} GB/s", f"{ours / compared:.2f}")
    for tokens in TOKENS:
        yield f"{_best(run, shape, state, tokens, 'dense') / _best(run, shape, state, tokens, run['backend']):.2f}x"


def _is(row: dict[str, Any], shape: str, tokens: int, what: str) -> bool:
    return (f"{row['rows']}x{row['columns']}", row["tokens"], row["what"]) == (shape, tokens, what)


def _best(run: dict[str, Any], shape: str, state: str, tokens: int, what: str) -> float:
    found: float = next(row["best_seconds"] for row in run["rows"] if row["state"] == state and _is(row, shape, tokens, what))
    return found


if __name__ == "__main__":
    sys.exit(main())
