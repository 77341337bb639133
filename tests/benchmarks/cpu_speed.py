"""CPU speed: a model in every scheme as our kernels run it, beside the dense one, torch's int4 and llama.cpp, in one run.

    python tests/benchmarks/cpu_speed.py [--rows "w4* mxfp4"] [--json recipes/cpu-speed.json] [--page recipes/cpu-speed.md]

Each row is a recipe and two fresh processes of `compress bench`: one prompt of 512 tokens and 32 more, and 32 tokens each for 8 and
64 texts after prompts of 32. Every number is a ratio to the dense model in the same rounds, so rows can be compared though the
machine is not as fast all the time. Experts are those of a Mixtral with random weights, made for the run. Says which rows were
timed while other processes were at work. Half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real.model import real_model
from benchmarks.real.process import measure
from benchmarks.real.rows import chosen
from benchmarks.real.table import digest, tell

from compress.errors import CompressError

ROOT = Path(__file__).parents[2]
COMPRESS = str(Path(sys.executable).with_name("compress"))
CASES = (("--batch", "1", "--prompt", "512"), ("--batch", "8,64", "--prompt", "32"))
NEW, ROUNDS = 32, 3
INT4, LLAMA = "torch's int4", "llama.cpp"
COLUMNS = {"1 token": ("decode", 1), "8 tokens": ("decode", 8), "64 tokens": ("decode", 64), "prompt of 512": ("prompt", 1)}
"""What each column is: tokens of a forward."""
NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size")
MIXTRAL = dict(zip(NUMBERS, (1024, 2048, 8, 8, 2, 8192), strict=True))
"""424 million parameters, of which a token needs 125."""
MAKE_MIXTRAL = """
import sys, torch
from transformers import MixtralConfig, MixtralForCausalLM
torch.manual_seed(0)
config = MixtralConfig(num_attention_heads=16, num_key_value_heads=4, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16", **{})
model = MixtralForCausalLM(config)
# Else which experts a token takes is decided by the rounding of bf16, and what is timed could not be checked.
with torch.no_grad():
    [p.mul_(20) for name, p in model.named_parameters() if "gate.weight" in name]
model.bfloat16().save_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class Row:
    """A recipe before `pack(format=native)`, and options of `bench`."""

    passes: str
    options: tuple[str, ...] = ()
    experts: bool = False
    """Whether the model is the Mixtral."""


def _rtn(scheme: str) -> Row:
    return Row(f"quantize.rtn(scheme={scheme})")


HEAD = " | quantize.rtn(scheme=w8a16g64, targets=[embeddings], skip_defaults=false)"
ROWS = {
    **{scheme: _rtn(scheme) for scheme in ("w2a16g64", "w3a16g64", "w4a16g64")},
    "w4a16g64, embeddings and head in w8": Row(f"quantize.rtn(scheme=w4a16g64){HEAD}"),
    **{scheme: _rtn(scheme) for scheme in ("w8a16g64", "nf4g64", "mxfp4", "nvfp4", "fp8", "w4a8g64", "w8a8")},
    "2:4, w4a16g64": Row("prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w4a16g64)"),
    "w4a16g64, activations in int8": Row("quantize.rtn(scheme=w4a16g64)", ("--backend", "integers")),
    f"w4a16g64 by {INT4}": Row("quantize.rtn(scheme=w4a16g64)", ("--backend", "int4pack")),
    "experts in w2": Row("quantize.moqe(scheme=w2a16)", experts=True),
    "experts in w4": Row("quantize.moqe(scheme=w4a16)", experts=True),
}
"""Those in the bits of which llama.cpp has a type are timed with it."""
PEERS = ("w2a16g64", "w3a16g64", "w4a16g64", "w8a16g64")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="patterns of rows")
    parser.add_argument("--model", type=Path, help="a checkpoint other than SmolLM2-135M")
    parser.add_argument("--again", action="store_true", help="put these rows in the place of those that the JSON file has")
    parser.add_argument("--no-peers", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args(arguments)
    try:
        model = asked.model or real_model(tell)
        names = chosen(asked.rows, list(ROWS), list(ROWS))
    except CompressError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    found: dict[str, Any] = {
        "model": model.name,
        "sha256": digest(model / "config.json", *sorted(model.glob("*.safetensors"))),
        "new_tokens": NEW,
        "rounds": ROUNDS,
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="compress-cpu-speed-") as scratch:
        for number, name in enumerate(names, 1):
            tell(f"[{number}/{len(names)}] {name}")
            found["rows"].append(time_row(name, ROWS[name], model, Path(scratch), name in PEERS and not asked.no_peers))
    if asked.again:
        before, now = json.loads(asked.json.read_text()), {row["name"]: {**row, "again": True} for row in found["rows"]}
        found = {**before, "rows": [now.get(row["name"], row) for row in before["rows"]]}
    text = page(found)
    print(text)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.page:
        asked.page.write_text(text)
    return 1 if any("error" in row for row in found["rows"]) else 0


def time_row(name: str, row: Row, model: Path, scratch: Path, peers: bool) -> dict[str, Any]:
    """What `compress bench` says of it, and the commands; or the error."""
    source, out = mixtral(scratch) if row.experts else model, scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = f"{row.passes} | pack(format=native)"
    commands = [[COMPRESS, "run", str(source), str(out), "-p", recipe, "--json"]]
    for case in CASES:
        more = ["--peers"] if peers and case is CASES[0] else []
        asked = [*case, "--new-tokens", str(NEW), "--rounds", str(ROUNDS), *row.options, *more, "--json"]
        commands.append([COMPRESS, "bench", str(out), "--against", str(source), *asked])
    made: dict[str, Any] = {"name": name, "commands": [_told(command, scratch, model) for command in commands], "speeds": []}
    for number, command in enumerate(commands):
        usage = measure(command, scratch / "log")
        if usage.status:
            said = [line for file in ("log.out", "log") for line in (scratch / file).read_text().splitlines() if line.strip()]
            return {**made, "error": said[-1:]}
        if number:
            timed = json.loads((scratch / "log.out").read_text())
            made["speeds"] += timed["speeds"]
            made |= {key: timed[key] for key in ("device", "backends", "difference", "allowed", "memory")}
            made["busy"] = made.get("busy", False) or usage.busy
    return made


def mixtral(scratch: Path) -> Path:
    """A Mixtral with random weights, made once for a run."""
    place = scratch / "mixtral"
    if not place.is_dir():
        code = MAKE_MIXTRAL.replace("**{}", f"**{MIXTRAL!r}")
        subprocess.run([sys.executable, "-c", code, str(place)], check=True, capture_output=True)
    return place


def _told(command: list[str], scratch: Path, model: Path) -> str:
    words = [Path(command[0]).name, *command[1:]]
    return " ".join(word.replace(str(scratch), "BUILD").replace(str(model), "MODEL") for word in words)


def page(found: dict[str, Any]) -> str:
    """A table, as Markdown."""
    made = [row for row in found["rows"] if "error" not in row]
    head = ["", "MB", *COLUMNS]
    lines = [
        "# Speed on CPUs, scheme by scheme", "",
        f"{found['model']}, bf16 activations, each row two fresh processes of `compress bench`: tokens a second, and the ratio to the",
        "dense bf16 model in the same rounds. 8 and 64 tokens are one each of as many texts. Written by",
        "`tests/benchmarks/cpu_speed.py`; cpu-speed.json has every round and every command.", "",
        "```sh", "python tests/benchmarks/cpu_speed.py --json recipes/cpu-speed.json --page recipes/cpu-speed.md", "```", "",
        "| " + " | ".join(head) + " |", "| " + " | ".join(["---", *["---:"] * (len(head) - 1)]) + " |",
    ]  # fmt: skip
    for row in made:
        size = row["memory"]["packed"]["tensor_bytes"] / 1e6
        lines.append("| " + " | ".join([row["name"], f"{size:.0f}", *_cells(row, "packed")]) + " |")
        if any(speed["label"] == LLAMA for speed in row["speeds"]):
            how = next(speed["how"] for speed in row["speeds"] if speed["label"] == LLAMA)
            lines.append("| " + " | ".join([f"{LLAMA}: {how}", "", *_cells(row, LLAMA)]) + " |")
    lines += ["", f"Machine: {made[0]['device'] if made else 'none'}."]
    if any(ROWS[row["name"]].experts for row in made):
        lines.append(f"Experts: a Mixtral with random weights, {', '.join(f'{key} {value}' for key, value in MIXTRAL.items())}.")
    if busy := [row["name"] for row in made if row["busy"]]:
        lines.append(f"Other processes were at work while these were timed: {', '.join(busy)}.")
    if again := [row["name"] for row in made if row.get("again")]:
        lines.append(f"Timed again after the others, because the machine was slower for a while: {', '.join(again)}.")
    lines += [f"{row['name']}: {' '.join(row['error'])}" for row in found["rows"] if "error" in row]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], label: str) -> list[str]:
    return [_cell(row, label, phase, batch) for phase, batch in COLUMNS.values()]


def _cell(row: dict[str, Any], label: str, phase: str, batch: int) -> str:
    best: Callable[[str], float | None] = lambda of: next(  # noqa: E731
        (s["best"] for s in row["speeds"] if (s["label"], s["phase"], s["batch"]) == (of, phase, batch)), None
    )
    ours, dense = best(label), best("dense")
    return "" if ours is None or dense is None else f"{ours:,.0f} ({ours / dense:.2f}x)"


if __name__ == "__main__":
    sys.exit(main())
