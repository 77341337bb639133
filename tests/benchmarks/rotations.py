"""Benchmark: quantizers with and without quantize.rotate before them, on trained weights: KL to the source.

    python tests/benchmarks/rotations.py MODEL --calibrate TEXT.jsonl --texts TEXT.jsonl [...] --results FILE [--seeds 3]

A seed draws signs and calibration samples. Every run is a line of FILE, and those that are there are not run again. Last it prints
the table, and how far the largest entry of a row of weights, and of an input, is from the root of the mean square.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers.utils import logging

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.evaluate.perplexity_kl import compare
from compress.layerwise.eval_windows import token_windows
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner

ROTATIONS = {
    "none": "", "R1 and R2": "quantize.rotate(untie=true)", "R2": "quantize.rotate(r1=false)",
    "block": "quantize.rotate(untie=true, kind=block)", "orthogonal": "quantize.rotate(untie=true, kind=orthogonal)",
}  # fmt: skip
SCHEMES, METHODS = ("w4a16", "w4a16g64", "w3a16g64", "mxfp4"), ("rtn", "gptq")


def rows(args: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    """(recipe, method and scheme or none, rotation, seed) of every run, seed by seed."""
    calibrate = f"calibrate(data={args.calibrate}, samples={args.samples}, length={args.length})"
    found = []
    for rotation in args.rotations:
        turn = ROTATIONS[rotation]
        for name in (*([""] if turn else []), *(f"{method} {scheme}" for scheme in args.schemes for method in METHODS)):
            method, _, scheme = name.partition(" ")
            lines = [calibrate if method == "gptq" else "", turn, f"quantize.{method}(scheme={scheme})" if scheme else ""]
            seeds = args.seeds if turn or method == "gptq" else 1
            found += [(" | ".join(line for line in lines if line), name, rotation, seed) for seed in range(seeds)]
    return sorted(found, key=lambda row: row[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rotations", nargs="+", choices=ROTATIONS, default=list(ROTATIONS))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    logging.disable_progress_bar()
    there = {json.loads(line)["recipe"] + str(json.loads(line)["seed"]) for line in lines(args.results)}
    windows = {text: token_windows(args.model, text, 256, args.tokens) for text in args.texts}
    for recipe, name, rotation, seed in rows(args):
        if recipe + str(seed) in there:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            result = run_recipe(parse_one_liner(recipe), open_checkpoint(args.model), Path(scratch) / "out", Context(seed=seed))
            found = {"recipe": recipe, "name": name, "rotation": rotation, "seed": seed, "seconds": time.perf_counter() - started}
            for text, ids in windows.items():
                q = compare(open_checkpoint(args.model), open_checkpoint(result.out), ids)
                found[text.name] = {"kl": q.kl.value, "error": q.kl.error, "perplexity": q.perplexity.value}
            if not name and not seed:
                found["peaks"] = {
                    "none": peaks(args.model, windows[args.texts[0]][:2]),
                    rotation: peaks(result.out, windows[args.texts[0]][:2]),
                }
            with args.results.open("a") as stream:
                stream.write(json.dumps(found) + "\n")
    table([json.loads(line) for line in lines(args.results)], args)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@torch.no_grad()
def peaks(folder: Path, windows: Any) -> dict[str, tuple[float, float]]:
    """Largest magnitude by root mean square: of rows of weights, and of inputs, by kind of linear; means over blocks."""
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), defaultdict(list)

    def ratio(x: torch.Tensor) -> float:
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-9)).mean())

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.endswith("_proj"):
            kind = path.rpartition(".")[2]
            module.register_forward_pre_hook(lambda m, given, kind=kind: seen[kind].append((ratio(m.weight), ratio(given[0]))))
    model(torch.as_tensor(windows))
    return {kind: (mean(w for w, _ in found), mean(x for _, x in found)) for kind, found in seen.items()}


def table(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints markdown."""
    for text in args.texts:
        print(f"\n{args.model.name}, {text.name}\n\n| | {' | '.join(args.rotations)} |\n| --- |{' ---: |' * len(args.rotations)}")
        for name in dict.fromkeys(one["name"] for one in found):
            cells = []
            for rotation in args.rotations:
                kls = [one[text.name]["kl"] for one in found if (one["name"], one["rotation"]) == (name, rotation)]
                spread = f" ± {stdev(kls):.4f}" if len(kls) > 1 else ""
                cells.append(f"{mean(kls):.4f}{spread}" if kls else "")
            print(f"| {name or 'dense'} | {' | '.join(cells)} |")
    for one in found:
        for rotation, by_kind in one.get("peaks", {}).items():
            print(rotation, "; ".join(f"{kind} {w:.2f}, {x:.2f}" for kind, (w, x) in by_kind.items()))


if __name__ == "__main__":
    main()
