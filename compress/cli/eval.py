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
from compress.errors import UsageError
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
    artifact: options.Checkpoint,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Text: .jsonl with a field 'text', or .txt; also .gz.")
    ] = None,
    against: options.Against = None,
    tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.", min=2)] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 256,
    batch: Annotated[int | None, typer.Option(help="Windows in one forward, if memory allows.", min=1)] = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Also measure the steps that ART was made by, if they are kept.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Tasks of lm-eval (extra `eval`), such as hellaswag,arc_easy.")
    ] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option("--task-data", metavar="TASK=FILE", help="A local file in place of a task's data on the Hub."),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", metavar="DIR", help="More tasks, in lm-eval's YAML.", file_okay=False, exists=True),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many questions of each task.", min=1)] = None,
    shots: Annotated[int | None, typer.Option(help="Examples in a prompt; by default the task's own number.", min=0)] = None,
    device: options.On = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.Trust = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Measure ART on a text, on tasks, or both: perplexity, and with --against how far its predictions are from those of SOURCE.

    Both models run in fp32 with one block of one of them in memory at a time. What was measured of an artifact is kept in it
    (evaluation.json), for its card and its report.
    """
    from compress.cli.eval_tasks import asked_tasks, run_both, show_tasks, task_facts, task_records
    from compress.layerwise.eval_windows import check_data, token_windows, tokenizer_folder

    if stages and data is None:
        raise UsageError("--stages", "--data beside it", "no text", "name a text, or leave it out")
    asked = asked_tasks(data, tasks, task_data, task_folder, limit, shots)
    if data is not None:
        check_data(data, length, tokens)
    from compress.device import name_of, resolve

    where = resolve(device)
    from transformers.utils import logging

    from compress.checkpoint.source import open_source
    from compress.evaluate.keep_quality import keep, kept_steps, records_of
    from compress.evaluate.perplexity_kl import compare

    logging.set_verbosity_error()
    checkpoint = open_source(artifact, trust_remote_code)
    source = open_source(against, trust_remote_code) if against is not None else None
    for model in filter(None, (checkpoint, source)):
        console.warn_of_code(model)
    folder = tokenizer_folder(source, checkpoint)
    windows = token_windows(folder, data, length, tokens, trust_remote_code) if data is not None else None
    started = time.perf_counter()
    measured = [*(kept_steps(checkpoint) if stages else ()), checkpoint]
    qualities, scores = [], None
    with compute_threads(threads), events(False, json_) as receive:
        if windows is not None:
            qualities = [compare(source, each, windows, batch, shares(receive, "eval", "measure"), where) for each in measured]
        if asked is not None:
            scores = run_both(source, checkpoint, folder, asked, receive, where, trust_remote_code)
    names = {"artifact": checkpoint.name, "source": source.name if source else None, "data": Path(data).name if data else None}
    names |= {"device": f"{where} ({name_of(where)})"} if where.type == "cuda" else {}
    seconds = time.perf_counter() - started
    found = qualities[-1] if qualities else None
    steps = [(pass_of(each), quality) for each, quality in zip(measured[:-1], qualities)]
    kept, why = "", "ART is no directory of this machine"
    if Path(artifact).is_dir():
        told = records_of(measured, qualities, source, data, names.get("device") or "cpu")
        kept, why = keep(measured, told, task_records(scores[0], asked) if scores and asked else [])
    if json_:
        content = {**names, **(facts(found) if found else {}), **(task_facts(scores) if scores else {})}
        content |= {"stages": [{"step": n, **facts(q)} for n, q in steps]} if steps else {}
        print(json.dumps({**content, "seconds": round(seconds, 2), "kept": kept or None}, ensure_ascii=False))
        return
    if steps:
        show_steps(steps)
    if found is not None:
        show(found, names)
    if scores is not None:
        show_tasks(scores, names)
    console.fact("took", f"{seconds:.1f} s")
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


def show(found: Quality, names: dict[str, str | None]) -> None:
    """Prints the measurement as a table, with its protocol."""
    estimates: dict[str, Estimate] = {name: getattr(found, name) for name in MEASURES}
    rows = [(MEASURES[name], *_cells(name, e)) for name, e in estimates.items() if not math.isnan(e.value)]
    errors = f"+-: the standard error over {found.tokens // found.length} windows, taken as independent"
    console.table(("measure", "value", "+-"), rows, errors)
    for label, name in names.items():
        if name is not None:
            console.fact(label, name)
    console.fact("protocol", found.protocol + ("; KL in nats per token" if names["source"] else ""))


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
