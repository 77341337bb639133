"""Benchmark: what recipes cost in quality on trained weights: perplexity and KL to the source, with the protocol.

    python tests/benchmarks/quality.py MODEL TEXT.jsonl --tokens 11776 RECIPE [RECIPE ...]

Each RECIPE is a one-liner. Prints bytes, bits per weight, perplexity, KL with its standard error, and seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers.utils import logging

from compress.checkpoint import open_checkpoint
from compress.cli.console import table
from compress.contract import Context
from compress.measure import compare
from compress.pipeline import run
from compress.recipe import parse_one_liner
from compress.windows import token_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--tokens", type=int, default=11_776)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    logging.disable_progress_bar()
    source = open_checkpoint(args.model)
    windows = token_windows(args.model, args.text, args.length, args.tokens)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, recipe in enumerate(args.recipes):
            result = run(parse_one_liner(recipe), source, Path(scratch) / str(number), Context())
            q = compare(source, open_checkpoint(result.out), windows)
            last = result.plan.steps[-1]
            rows.append((
                recipe, f"{last.payload_bytes:,}", f"{result.plan.bits(last, list(result.manifest.weights)):.3f}",
                f"{q.perplexity.value:.3f}", f"{q.kl.value:.5f}", f"{q.kl.error:.5f}", f"{q.top1.value:.2%}",
                f"{result.seconds:.1f}",
            ))  # fmt: skip
    table(("recipe", "tensor bytes", "bits/weight", "perplexity", "KL", "+-", "same top-1", "s"), rows)
    own = f"perplexity {q.source_perplexity.value:.3f}"
    print(f"source: {args.model.name}, {source.nbytes:,} bytes, {own} on {args.text.name}, {q.protocol}")


if __name__ == "__main__":
    main()
