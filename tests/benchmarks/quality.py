"""Benchmark: what recipes cost in quality on trained weights: perplexity and KL to the source, with the protocol.

    python tests/benchmarks/quality.py MODEL TEXT.jsonl [TEXT.jsonl ...] --tokens 11776 --seeds 3 -p RECIPE [-p RECIPE ...]

Each RECIPE is a one-liner. One that calibrates is run once for each seed, and its KL is a mean with the spread (standard
deviation) over seeds; the standard error of one KL over windows stands beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

from transformers.utils import logging

from compress.account import peak_resident_bytes
from compress.checkpoint import open_checkpoint
from compress.cli.console import size, table
from compress.contract import Context
from compress.measure import compare
from compress.pipeline import run
from compress.recipe import parse_one_liner
from compress.windows import token_windows


def forget_peak() -> None:
    """Makes the peak that Linux keeps of this process start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("-p", "--passes", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=11_776)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    logging.disable_progress_bar()
    source = open_checkpoint(args.model)
    windows = {text: token_windows(args.model, text, args.length, args.tokens) for text in args.texts}
    rows, own = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, recipe in enumerate(args.passes):
            found: dict[Path, list[tuple[float, float, float, float]]] = {text: [] for text in args.texts}
            seconds, peaks, bits = [], [], 0.0
            for seed in range(args.seeds if "calibrate" in recipe or "distill" in recipe else 1):
                forget_peak()
                result = run(parse_one_liner(recipe), source, Path(scratch) / f"{number}-{seed}", Context(seed=seed))
                seconds.append(result.seconds)
                peaks.append(peak_resident_bytes())
                bits = result.plan.bits(result.plan.steps[-1], list(result.manifest.weights))
                for text, ids in windows.items():
                    q = compare(source, open_checkpoint(result.out), ids)
                    found[text].append((q.perplexity.value, q.kl.value, q.kl.error, q.top1.value))
                    own[text] = f"{q.source_perplexity.value:.3f} on {text.name}"
            for text, values in found.items():
                perplexities, kls, errors, same = zip(*values, strict=True)
                rows.append((
                    recipe.split("|")[-2 if "| pack" in recipe else -1].strip(), text.name, f"{bits:.3f}", f"{mean(perplexities):.3f}",
                    f"{mean(kls):.5f}", f"{stdev(kls):.5f}" if len(kls) > 1 else "", f"{mean(errors):.5f}", f"{mean(same):.2%}",
                    f"{mean(seconds):.1f}", size(max(peaks)),
                ))  # fmt: skip
    head = ("recipe", "text", "bits/weight", "perplexity", "KL", "spread", "+-", "same top-1", "s", "peak")
    table(head, rows, title=f"{args.model.name}: {args.seeds} seeds of calibration")
    print(f"source: {source.nbytes:,} bytes, perplexity {', '.join(own.values())}; {q.protocol}")


if __name__ == "__main__":
    main()
