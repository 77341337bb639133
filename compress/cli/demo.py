"""`compress demo`: the embedded model at four widths, measured, offline."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.recipe import parse_one_liner

if TYPE_CHECKING:
    from compress.measure import Quality
    from compress.pipeline import Result

KEPT = "w4a16g32"
SCHEMES = ("w8a16g32", KEPT, "w3a16g32", "w2a16g32")
LENGTH = 256


def register(app: typer.Typer) -> None:
    app.command("demo")(verb)


@guarded
def verb(
    out: Annotated[Path, typer.Argument(help="Where the artifact goes.")] = Path("compress-demo"),
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compress the embedded model (0.9 M parameters, trained on CPython's sources) at four widths and measure each."""
    import compress.demo

    home = Path(compress.demo.__file__).parent
    with tempfile.TemporaryDirectory(prefix="compress-demo-") as scratch:
        results, rows = [], []
        for scheme in SCHEMES:
            place = out if scheme == KEPT else Path(scratch) / scheme
            result, quality = one(home, place, scheme, quiet)
            results.append((scheme, result))
            rows.append((scheme, quality))
        if not quiet:
            report(home, out, results, rows)


def one(home: Path, place: Path, scheme: str, quiet: bool) -> tuple[Result, Quality]:
    """Runs one width and compares it with the source."""
    from transformers.utils import logging

    from compress.checkpoint import open_checkpoint
    from compress.contract import Context
    from compress.measure import compare
    from compress.pipeline import run
    from compress.windows import token_windows

    logging.disable_progress_bar()
    source = open_checkpoint(home / "model")
    recipe = parse_one_liner(f"quantize.rtn(scheme={scheme}) | pack(format=compressed-tensors)")
    with console.events(False, quiet) as receive:
        result = run(recipe, source, place, Context(events=receive))
    windows = token_windows(home / "model", home / "text" / "evaluation.jsonl", LENGTH)
    return result, compare(source, open_checkpoint(place), windows)


def report(home: Path, out: Path, results: list[tuple[str, Result]], rows: list[tuple[str, Quality]]) -> None:
    """The table, the protocol, and what to do with the artifact."""
    first = rows[0][1]
    before = results[0][1].plan.source_bytes
    table = [("source (bf16)", f"{before:,}", "16.000", "-", f"{first.source_perplexity.value:.2f}", "-", "-")]
    for (scheme, result), (_, quality) in zip(results, rows, strict=True):
        last = result.plan.steps[-1]
        bits = f"{result.plan.bits(last, list(result.manifest.weights)):.3f}"
        share = f"{last.payload_bytes / before:.1%}"
        table.append((
            scheme, f"{last.payload_bytes:,}", bits, share, f"{quality.perplexity.value:.2f}",
            f"{quality.kl.value:.4f} +- {quality.kl.error:.4f}", f"{quality.top1.value:.1%}",
        ))  # fmt: skip
    console.table(("scheme", "tensor bytes", "bits/weight", "size", "perplexity", "KL to source", "same top-1"), table)
    print(f"protocol: embedded evaluation text, {first.protocol}; KL in nats per token")
    print(f"where:    {out} ({KEPT}, packed for compressed-tensors)")
    print(f"reader:   {reader(home, out)}")
    print(f"next:     compress show {out}")


def reader(home: Path, out: Path) -> str:
    """Loads the artifact with transformers itself and compares logits with ours."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return "not checked: pip install 'compress-llm[readers]' for compressed-tensors"
    import torch
    from transformers import AutoModelForCausalLM

    from compress.checkpoint import open_checkpoint
    from compress.model import build
    from compress.windows import token_windows

    ids = token_windows(home / "model", home / "text" / "evaluation.jsonl", LENGTH, LENGTH)
    # The reader draws progress bars; what goes wrong is raised all the same.
    with torch.inference_mode(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        theirs = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)(input_ids=ids).logits
        ours = build(open_checkpoint(out), "bfloat16")(input_ids=ids).logits
    difference = float((theirs - ours).abs().max())
    return f"transformers loads it; largest logit difference from our own reading: {difference:g}"
