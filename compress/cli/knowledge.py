"""`compress knowledge`: which facts a compressed model has forgotten."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.progress import events, shares
from compress.threads import compute_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.evaluate.knowledge import Answer, Quiz, RelationReport


def register(app: typer.Typer) -> None:
    app.command("knowledge")(command)


@guarded
def command(
    artifact: options.Checkpoint,
    against: options.Against = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Facts as .jsonl, in LAMA's form; by default a small set."),
    ] = None,
    relations: Annotated[
        Path | None, typer.Option("--relations", metavar="FILE", help="Templates by relation as .jsonl, in LAMA's form.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Most objects that a fact is chosen from.", min=2)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of what the candidates are drawn by.", min=0)] = 0,
    device: options.On = "auto",
    threads: options.Threads = None,
    details: options.Details = False,
    trust_remote_code: options.Trust = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Ask a causal language model facts by cloze sentences, relation by relation; with --against, which of them were lost.

    A fact is known if its own object makes the sentence likelier than any other of its relation. --details names those lost.
    """
    from transformers.utils import logging

    from compress.checkpoint.source import open_source
    from compress.device import resolve
    from compress.evaluate.knowledge import OWN, Quiz, read_facts
    from compress.layerwise.eval_windows import tokenizer_folder

    logging.set_verbosity_error()
    quiz = Quiz(read_facts(data or OWN, relations), candidates, seed)
    where = resolve(device)
    checkpoint = open_source(artifact, trust_remote_code)
    source = open_source(against, trust_remote_code) if against is not None else None
    for model in filter(None, (checkpoint, source)):
        console.warn_of_code(model)
    folder = tokenizer_folder(source, checkpoint)
    started = time.perf_counter()
    with compute_threads(threads), events(False, json_) as receive:
        ours = quiz.answers(checkpoint, folder, shares(receive, "knowledge", "ask"), where, trust_remote_code)
        theirs = None
        if source is not None:
            theirs = quiz.answers(source, folder, shares(receive, "knowledge", "ask the source"), where, trust_remote_code)
    reports = quiz.reports(ours, theirs)
    names = {"artifact": checkpoint.name, "source": source.name if source else None, "data": data.name if data else "built in"}
    most = max(map(len, quiz.candidates))
    protocol = (
        f"{len(quiz.facts):,} facts, at most {most} candidates of the same relation, whole sentences, BOS before each, fp32"
    )
    if json_:
        changed = {"lost": list(_changed(quiz, theirs, ours)), "gained": list(_changed(quiz, ours, theirs))}
        facts = {**names, "relations": [asdict(one) for one in reports], **changed, "protocol": protocol}
        print(json.dumps(facts, ensure_ascii=False))
        return
    _show(reports)
    for label, name in names.items():
        if name is not None:
            console.fact(label, name)
    console.fact("protocol", protocol)
    lost = list(_changed(quiz, theirs, ours))
    for one in lost if details else ():
        console.fact("lost", f"{one['relation']}: {one['sentence']}: {one['object']}, now {one['now']}")
    if lost and not details:
        console.fact("lost", f"{len(lost):,} facts; --details names them")
    console.fact("took", f"{time.perf_counter() - started:.1f} s")


def _changed(quiz: Quiz, before: Sequence[Answer] | None, after: Sequence[Answer] | None) -> Any:
    """Facts that are known by `before` and not by `after`."""
    if before is None or after is None:
        return
    for number, fact in enumerate(quiz.facts):
        if quiz.knows(number, before) and not quiz.knows(number, after):
            sentence = f"{fact.before} [MASK]{fact.after}".strip()
            yield {"relation": fact.relation, "sentence": sentence, "object": fact.object, "now": after[number].best}


def _show(reports: Sequence[RelationReport]) -> None:
    """Prints the relations as a table."""
    both = reports[0].source_known is not None
    rows = []
    for one in reports:
        known, likely = f"{one.known / one.facts:.1%}", f"{one.probability:.3f}"
        if both:
            before = f"{(one.source_known or 0) / one.facts:.1%}"
            shares_ = [before, known, str(one.lost), str(one.gained), f"{one.source_probability:.3f}", likely]
        else:
            shares_ = [known, likely]
        rows.append((one.relation, f"{one.facts:,}", str(one.candidates), *shares_))
    head = ("relation", "facts", "of", *(("source", "known", "lost", "gained", "p source", "p") if both else ("known", "p")))
    chance = sum(one.facts / one.candidates for one in reports[:-1]) / reports[-1].facts
    error = math.sqrt(max(reports[-1].known * (reports[-1].facts - reports[-1].known), 0) / reports[-1].facts ** 3)
    console.table(
        head, rows,
        f"of: candidates (by chance {chance:.1%} are known); known: the right object is the likeliest, +- {error:.1%} over all; "
        "p: geometric mean of its probability among the candidates",
    )  # fmt: skip
