"""`compress eval`: perplexity, and the KL of an artifact to its source."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.progress import events, shares
from compress.threads import compute_threads

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.evaluate.perplexity_kl import Estimate, Quality

MEASURES = {
    "source_perplexity": "perplexity of the source",
    "perplexity": "perplexity",
    "kl": "KL(source || artifact), mean",
    "kl_median": "KL, median",
    "kl_p99": "KL, 99th percentile",
    "top1": "same top-1",
}


def register(app: typer.Typer) -> None:
    app.command("eval")(command)


@guarded
def command(
    artifact: Annotated[str, typer.Argument(help="A checkpoint in any state: a directory, or a Hub id.", metavar="ART")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Text: .jsonl with a field 'text', or .txt; also .gz.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="SOURCE", help="The checkpoint to compare with, also in any state.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.", min=2)] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 256,
    batch: Annotated[int | None, typer.Option(help="Windows in one forward, if memory allows.", min=1)] = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Also measure the steps that ART was made by, if they are kept.")
    ] = False,
    device: options.On = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.Trust = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Measure ART on a text: perplexity, and with --against how far its predictions are from those of SOURCE.

    Both models run in fp32 with one block of one of them in memory at a time. What was measured of an artifact is kept in it
    (evaluation.json), for its card and its report.
    """
    from compress.layerwise.eval_windows import check_data, token_windows, tokenizer_folder

    check_data(data, length, tokens)
    from compress.device import name_of, resolve

    where = resolve(device)
    from transformers.utils import logging

    from compress.checkpoint.source import open_source
    from compress.evaluate.keep_quality import keep, kept_steps
    from compress.evaluate.perplexity_kl import compare

    logging.set_verbosity_error()
    checkpoint = open_source(artifact, trust_remote_code)
    source = open_source(against, trust_remote_code) if against is not None else None
    for model in filter(None, (checkpoint, source)):
        console.warn_of_code(model)
    windows = token_windows(tokenizer_folder(source, checkpoint), data, length, tokens, trust_remote_code)
    started = time.perf_counter()
    measured = [*(kept_steps(checkpoint) if stages else ()), checkpoint]
    with compute_threads(threads), events(False, json_) as receive:
        qualities = [compare(source, each, windows, batch, shares(receive, "eval", "measure"), where) for each in measured]
    found = qualities[-1]
    names = {"artifact": checkpoint.name, "source": source.name if source else None, "data": Path(data).name}
    names |= {"device": f"{where} ({name_of(where)})"} if where.type == "cuda" else {}
    seconds = time.perf_counter() - started
    steps = [(pass_of(each), quality) for each, quality in zip(measured, qualities)][:-1]
    kept, why = "", "ART is no directory of this machine"
    if Path(artifact).is_dir():
        kept, why = keep(measured, qualities, source, Path(data), names.get("device") or "cpu")
    if json_:
        content = {**names, **facts(found), **({"stages": [{"step": n, **facts(q)} for n, q in steps]} if steps else {})}
        print(json.dumps({**content, "seconds": round(seconds, 2), "kept": kept or None}, ensure_ascii=False))
        return
    if steps:
        show_steps(steps)
    show(found, names, seconds)
    if kept:
        # Paths and commands are to be copied, so each is in one line, however long.
        print(f"kept:     {kept}")
        print(f"next:     {shlex.join(['compress', 'card', artifact, '--write'])}")
    elif checkpoint.manifest is not None:
        print(f"note: not kept: {why}", file=sys.stderr)


def pass_of(checkpoint: Checkpoint) -> str:
    """The name of the pass that made a step."""
    assert checkpoint.manifest is not None
    return checkpoint.manifest.lineage[-1].text.partition("(")[0]


def show_steps(steps: list[tuple[str, Quality]]) -> None:
    """Prints a row for each step before the artifact."""
    rows = [
        (name, *_cells("perplexity", found.perplexity), *_cells("kl", found.kl), _cells("top1", found.top1)[0])
        for name, found in steps
    ]
    console.table(("step before", "perplexity", "+-", "KL", "+-", "same top-1"), rows)
    print()


def facts(found: Quality) -> dict[str, Any]:
    """The measurement as JSON; null where there is no number."""
    estimates = {name: getattr(found, name) for name in MEASURES}
    return {
        "tokens": found.tokens, "length": found.length, "windows": found.tokens // found.length, "scored": found.scored,
        **{n: {part.name: _finite(getattr(e, part.name)) for part in fields(e)} for n, e in estimates.items()},
        "protocol": found.protocol,
    }  # fmt: skip


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def show(found: Quality, names: dict[str, str | None], seconds: float) -> None:
    """Prints the measurement as a table, with its protocol."""
    estimates: dict[str, Estimate] = {name: getattr(found, name) for name in MEASURES}
    rows = [(MEASURES[name], *_cells(name, e)) for name, e in estimates.items() if not math.isnan(e.value)]
    errors = f"+-: the standard error over {found.tokens // found.length} windows, taken as independent"
    console.table(("measure", "value", "+-"), rows, errors)
    for label, name in names.items():
        if name is not None:
            console.fact(label, name)
    console.fact("protocol", found.protocol + ("; KL in nats per token" if names["source"] else ""))
    console.fact("took", f"{seconds:.1f} s")


def _cells(name: str, estimate: Estimate) -> tuple[str, str]:
    """A label, a number and its standard error, as cells of the table."""
    texts = []
    for number in (estimate.value, estimate.error):
        if math.isnan(number):
            texts.append("-")
        elif name == "top1":
            texts.append(f"{number:.2%}")
        elif name.startswith("kl"):
            texts.append(f"{number:.6f}" if number else "0")
        else:
            texts.append(f"{number:.3f}")
    return texts[0], texts[1]
