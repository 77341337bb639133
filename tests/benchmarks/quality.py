"""Benchmark: what recipes cost in quality on trained weights: perplexity and KL to the source, with the protocol.

    python tests/benchmarks/quality.py MODEL TEXT.jsonl [TEXT.jsonl ...] --tokens 11776 --seeds 3 -p RECIPE [-p RECIPE ...]

Each RECIPE is a one-liner. One that calibrates is run once for each seed, and its KL is a mean with the spread (standard
deviation) over seeds; the standard error of one KL over windows stands beside it. `of source` is what is left of the source's
bytes, and `by codes` what would be left without scales: (1 - f) + f b / 16 where b bits are given to a share f of the bytes.

    python tests/benchmarks/quality.py MODEL TEXT.jsonl --experts

rounds the routed experts of MODEL alone (quantize.moqe), then all linears alike, to 8, 4, 3 and 2 bits per output channel.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

from transformers.utils import logging

from compress.checkpoint.reader import open_checkpoint
from compress.cli.console import size, table
from compress.context import Context
from compress.evaluate.perplexity_kl import compare
from compress.layerwise.eval_windows import token_windows
from compress.pipeline.build_manifest import peak_resident_bytes
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner
from compress.spec.weight_state import State, Weight


def forget_peak() -> None:
    """Makes the peak that Linux keeps of this process start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def by_codes(weights: list[Weight], states: dict[str, State]) -> float:
    """Bytes of weights in these states, were there no scales."""
    schemes = {weight: states[weight.name].scheme for weight in weights}
    return sum(weight.nbytes if scheme is None else weight.numel * scheme.bits / 8 for weight, scheme in schemes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("-p", "--passes", action="append", default=[])
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--tokens", type=int, default=11_776)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.experts:
        args.passes += [f"quantize.{name}(scheme=w{bits}a16)" for name in ("moqe", "rtn") for bits in (8, 4, 3, 2)]
    if not args.passes:
        parser.error("-p RECIPE, or --experts")
    logging.disable_progress_bar()
    title = f"{args.model.name}: {args.seeds} seeds of calibration"
    report(title, *measured(args.model, args.texts, args.passes, args.tokens, args.length, args.seeds))


def measured(
    model: Path, texts: list[Path], recipes: list[str], tokens: int, length: int, seeds: int
) -> tuple[list[tuple[str, ...]], str]:
    """A row of the table for each recipe and text, and what is said of the source and the protocol."""
    source = open_checkpoint(model)
    windows = {text: token_windows(model, text, length, tokens) for text in texts}
    rows, own = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, recipe in enumerate(recipes):
            found: dict[Path, list[tuple[float, float, float, float]]] = {text: [] for text in texts}
            seconds, peaks, bits = [], [], 0.0
            for seed in range(seeds if "calibrate" in recipe or "distill" in recipe else 1):
                forget_peak()
                result = run_recipe(parse_one_liner(recipe), source, Path(scratch) / f"{number}-{seed}", Context(seed=seed))
                seconds.append(result.seconds)
                peaks.append(peak_resident_bytes())
                step = result.plan.steps[-1]
                bits = result.plan.bits(step, list(result.manifest.weights))
                for text, ids in windows.items():
                    q = compare(source, open_checkpoint(result.out), ids)
                    found[text].append((q.perplexity.value, q.kl.value, q.kl.error, q.top1.value))
                    own[text] = f"{q.source_perplexity.value:.3f} on {text.name}"
            for text, values in found.items():
                perplexities, kls, errors, same = zip(*values, strict=True)
                passes = [part.strip() for part in recipe.split("|")]
                rows.append((
                    " | ".join(p for p in passes if p != "pack" and not p.startswith("calibrate(")), text.name, f"{bits:.3f}",
                    f"{step.payload_bytes:,}", f"{step.payload_bytes / source.nbytes:.4f}",
                    f"{by_codes(result.plan.weights, step.after) / source.nbytes:.4f}", f"{mean(perplexities):.3f}",
                    f"{mean(kls):.5f}", f"{stdev(kls):.5f}" if len(kls) > 1 else "", f"{mean(errors):.5f}", f"{mean(same):.2%}",
                    f"{mean(seconds):.1f}", size(max(peaks)),
                ))  # fmt: skip
    return rows, f"source: {source.nbytes:,} bytes, perplexity {', '.join(own.values())}; {q.protocol}"


def report(title: str, rows: list[tuple[str, ...]], last: str) -> None:
    """Prints the table."""
    head = (
        "recipe", "text", "bits/weight", "bytes", "of source", "by codes", "perplexity", "KL", "spread", "+-", "same top-1", "s",
        "peak",
    )  # fmt: skip
    table(head, rows, title=title)
    print(last, flush=True)


if __name__ == "__main__":
    main()
