"""Write card: puts a card, its picture and results of tasks into an artifact."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint.atomic import write_text
from compress.checkpoint.reader import PICTURE, README
from compress.errors import InputError
from compress.report.card import MARK, card
from compress.report.escape import printable
from compress.report.facts import Facts, read_facts
from compress.report.picture import picture

if TYPE_CHECKING:
    from huggingface_hub import EvalResultEntry

RESULTS = ".eval_results"
"""The folder in which the Hub looks for results on its datasets."""


def write_card(directory: Path, place: str = "PATH") -> list[Path]:
    """Writes the card of an artifact anew; returns the files. Raises InputError where README.md is somebody else's."""
    if not is_ours(directory):
        do = "move it away, or leave --write out and copy what you need"
        raise InputError(str(directory / README), "a card that compress has written", "another one", do)
    return [write_text(directory / name, text) for name, text in card_files(directory, place).items()]


def is_ours(directory: Path) -> bool:
    """Whether the card of an artifact may be written anew: there is none, or compress has written it."""
    readme = directory / README
    return not readme.is_file() or MARK in readme.read_text(encoding="utf-8", errors="replace")


def card_files(directory: Path, place: str = "PATH") -> dict[str, str]:
    """Texts of the card and what belongs to it, by name; the card last, so that one that is there has all that it shows."""
    facts = read_facts(directory)
    drawn = picture(facts.layers)
    results = {f"{RESULTS}/{name}": text for name, text in eval_results(facts).items()}
    return {**({PICTURE: drawn} if drawn else {}), **results, README: card(facts, place)}


def ensure_card(directory: Path) -> None:
    """Writes the card of an artifact that has none; users may write on theirs."""
    if not (directory / README).exists():
        write_card(directory)


def eval_results(facts: Facts) -> dict[str, str]:
    """Files of results on tasks whose dataset is on the Hub, by name, in the form that its leaderboards read."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

    files: dict[str, list[EvalResultEntry]] = defaultdict(list)
    for task in facts.tasks:
        if not task.dataset or not task.complete:
            continue
        notes = f"{task.metric}, {task.shots}-shot, {task.samples} samples, {task.harness}"
        name = re.sub(r"[^\w-]", "-", task.dataset.rpartition("/")[2], flags=re.ASCII)
        files[f"{name}.yaml"].append(EvalResultEntry(
            dataset_id=printable(task.dataset), task_id=printable(task.config or task.task), value=task.value,
            dataset_revision=printable(task.dataset_revision) or None, date=printable(task.when) or None, notes=printable(notes),
        ))  # fmt: skip
    return {name: yaml_dump(eval_result_entries_to_yaml(entries)) for name, entries in files.items()}
