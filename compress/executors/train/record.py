"""Record: a line of JSON for every training step, and a picture of the loss.

    training.jsonl   step, loss per scored token, learning rate, norm of the gradient, tokens so far, what the objective adds;
                     where the weights of domains were moved, for each its loss, the reference, its new weight and its samples
    training.svg     the loss over the steps
    domains.svg      the weights of domains, and their losses above the references
It holds no times, so that the same run gives the same bytes; the manifest has them under `measured`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compress.checkpoint.reader import TRAINING

LINES, PICTURE, DOMAINS = TRAINING


class Record:
    """The record of one run, in the directory that it makes."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title

    def _rows(self) -> list[dict[str, Any]]:
        """The lines so far, without a last one that a crash has cut."""
        path = self.folder / LINES
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def back_to(self, step: int) -> int:
        """Drops the lines after `step` steps; returns the tokens until then."""
        rows = [row for row in self._rows() if row["step"] <= step]
        if (self.folder / LINES).is_file():
            # A kill in the middle must leave either the old lines or the new ones.
            new = self.folder / f".{LINES}.new"
            new.write_text("".join(json.dumps(row) + "\n" for row in rows))
            new.replace(self.folder / LINES)
            self.keep()
        return int(rows[-1]["tokens"]) if rows else 0

    def told(self, word: str) -> list[Any]:
        """What the lines so far tell under a word, where they have it."""
        return [row[word] for row in self._rows() if word in row]

    def add(self, **row: Any) -> None:
        """Writes down a step."""
        with open(self.folder / LINES, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def keep(self) -> None:
        """Makes the lines so far durable; a saved state relies on them."""
        with open(self.folder / LINES, "a") as stream:
            os.fsync(stream.fileno())

    def draw(self) -> None:
        """Makes the pictures."""
        from compress.plots import domains, losses

        if rows := self._rows():
            losses(self.folder / PICTURE, rows, self.title)
        if updates := [row for row in rows if "domains" in row]:
            domains(self.folder / DOMAINS, updates, self.title)
