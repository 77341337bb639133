"""The tasks of `compress eval`: what is asked for, and the table of scores."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli import console
from compress.cli.progress import shares
from compress.errors import UsageError

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint
    from compress.evaluate.records import TaskRecord
    from compress.evaluate.tasks import TaskOptions, TaskScore

    Scores = tuple[list[TaskScore], list[TaskScore] | None]
    """The artifact's, and the source's if there is one."""


def asked_tasks(
    data: str | None, tasks: str | None, task_data: list[str] | None, folder: Path | None, limit: int | None, shots: int | None
) -> TaskOptions | None:
    """The tasks that were asked for, None for none. Raises UsageError for options without one, and for nothing to measure."""
    if tasks is None:
        given = {"--task-data": task_data, "--task-folder": folder, "--limit": limit, "--shots": shots}
        if alone := [option for option, value in given.items() if value is not None]:
            raise UsageError(alone[0], "--tasks beside it", "it alone", "name the tasks, or leave it out")
        if data is None:
            raise UsageError("eval", "--data FILE or --tasks A,B", "neither", "give a text, tasks of lm-eval, or both")
        return None
    from compress.evaluate.tasks import TaskOptions

    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise UsageError("--tasks", "names between commas", f"'{tasks}'", "such as --tasks hellaswag,arc_easy")
    files = {}
    for text in task_data or ():
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise UsageError("--task-data", "TASK=FILE", f"'{text}'", "such as --task-data hellaswag=validation.jsonl")
        files[name] = Path(file)
    return TaskOptions(names, files, folder, limit, shots)


def run_both(
    source: Checkpoint | None,
    artifact: Checkpoint,
    folder: Path,
    asked: TaskOptions,
    receive: Any,
    where: torch.device,
    trusted: bool,
) -> Scores:
    """Runs the tasks on the artifact, and on the source if there is one."""
    from compress.evaluate.tasks import run_tasks

    told = [
        run_tasks(one, folder, asked, shares(receive, "eval", phase), where, trusted)
        for one, phase in ((artifact, "tasks"), (source, "tasks of the source"))
        if one is not None
    ]
    return told[0], told[1] if len(told) == 2 else None


def task_records(scores: list[TaskScore], asked: TaskOptions) -> list[TaskRecord]:
    """What is kept of the artifact's scores."""
    from compress.evaluate.records import TaskRecord, now
    from compress.evaluate.tasks import harness

    when = now()
    return [
        TaskRecord(
            task=one.task, metric=one.metric, value=one.value, error=one.error, dataset="" if one.local else one.dataset,
            config=one.config, split=one.split, shots=one.shots, samples=one.documents, complete=asked.limit is None,
            harness=harness(), when=when,
        )
        for one in scores
        if math.isfinite(one.value)
    ]  # fmt: skip


def task_facts(scores: Scores) -> dict[str, Any]:
    """Scores as JSON."""
    ours, theirs = scores
    return {"tasks": [asdict(one) for one in ours]} | (
        {"source_tasks": [asdict(one) for one in theirs]} if theirs is not None else {}
    )


def show_tasks(scores: Scores, names: dict[str, str | None]) -> None:
    """Prints the scores as a table."""
    ours, theirs = scores
    other = {(one.task, one.metric): one for one in theirs or ()}
    rows = []
    for one in ours:
        before = other.get((one.task, one.metric))
        rows.append((
            one.task, one.metric, *((_number(before.value), ) if before else ()), _number(one.value),
            "-" if one.error is None else _number(one.error), f"{one.documents:,}", str(one.shots),
        ))  # fmt: skip
    head = ("task", "metric", *(("source",) if other else ()), "artifact", "+-", "questions", "shots")
    console.table(head, rows, "+-: the standard error that lm-eval gives for the artifact")
    for label in ("artifact", "source"):
        if names[label] is not None:
            console.fact(label, str(names[label]))
    console.fact("data", ", ".join(dict.fromkeys(one.dataset for one in ours)))
    from compress.evaluate.tasks import harness

    cut = max((one.cut for one in ours), default=0)
    longer = f"; {cut:,} prompts longer than the model's positions lost their beginning" if cut else ""
    console.fact("protocol", f"{harness()}, fp32, no special tokens before a text, seed 0{longer}")


def _number(value: float) -> str:
    return f"{value:.4f}"
