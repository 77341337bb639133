"""Fail on: `--fail-on`, limits on fallbacks, skips and errors of a run.

    fallbacks>1%     matrices that were rounded to nearest instead, as a share of those that the checkpoint's passes worked on
    clamped>0        as a number; further words: skips, unrouted, damped, ragged, zero-rows, nonfinite
    error>0.3        weights whose relative error is larger

A gate checks the manifest of every step, so it also holds for steps that an earlier run has made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import GateError, Problem, UsageError, did_you_mean, few

if TYPE_CHECKING:
    from compress.checkpoint.manifest import Manifest, NoteRecord
    from compress.contract.step_plan import StepPlan
    from compress.spec.weight_state import Note, Weight

WORDS = {
    "skips": ("skipped",), "fallbacks": ("fallback", "unrouted"), "unrouted": ("unrouted",), "damped": ("damping",),
    "clamped": ("clamped",), "zero-rows": ("zero rows",), "ragged": ("ragged",), "nonfinite": ("nonfinite",),
}  # fmt: skip
"""Word of a gate -> the words in a manifest's notes that it counts."""
ERROR = "error"
NAMED = frozenset({"large error", *(word for words in WORDS.values() for word in words)})
"""Words of notes about deviations from what was asked."""
_GRAMMAR = re.compile(r"\s*([a-z][a-z-]*)\s*>\s*(\d{1,12}(?:\.\d{1,9})?)\s*(%?)\s*", re.ASCII)


@dataclass(frozen=True)
class Gate:
    """A limit: the count of `word` may be at most `limit`, or `limit` percent."""

    word: str
    limit: float
    percent: bool

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Raises UsageError."""
        known = (*WORDS, ERROR)
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            raise UsageError(f"--fail-on '{text}'", "a word and a limit, such as fallbacks>1% or skips>0", "something else")
        if match[1] not in known:
            raise UsageError(f"--fail-on '{text}'", f"one of {', '.join(known)}", f"'{match[1]}'{did_you_mean(match[1], known)}")
        if match[1] == ERROR and match[3]:
            raise UsageError(f"--fail-on '{text}'", "an error as a number, such as error>0.3", "a share")
        return cls(match[1], float(match[2]), bool(match[3]))

    def __str__(self) -> str:
        return f"{self.word}>{self.limit:g}{'%' if self.percent else ''}"


def hold(gates: Sequence[Gate], manifest: Manifest | None) -> None:
    """Raises GateError for everything in a manifest that exceeds a gate."""
    if manifest is None:
        return
    shapes = [record.shape for record in manifest.weights.values()]
    problems = [p for gate in gates for p in _over(gate, manifest.notes, matrices(shapes), manifest.lineage[-1].text)]
    for gate in gates:
        if gate.word == ERROR:
            worst = sorted(((record.error or 0.0, name) for name, record in manifest.weights.items()), reverse=True)
            over = [f"{name} ({error:.3f})" for error, name in worst if error > gate.limit]
            problems += [_problem(gate, f"{len(over)} weights", over, manifest.lineage[-1].text)] if over else []
    if problems:
        raise GateError(problems)


def hold_plan(gates: Sequence[Gate], step: StepPlan, weights: Sequence[Weight]) -> None:
    """Checks gates against a planned step, before any work: skips, for example, are known then."""
    touched = set(step.transformed)
    whole = matrices(weight.shape for weight in weights if weight.name in touched)
    if problems := [p for gate in gates for p in _over(gate, step.notes, whole, step.name)]:
        raise GateError(problems)


def matrices(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many matrices some weights hold: each fused expert is one."""
    return sum(shape[0] if len(shape) == 3 else 1 for shape in shapes)


def _over(gate: Gate, notes: Sequence[Note | NoteRecord], whole: int, where: str) -> list[Problem]:
    names = [name for note in notes if note.what in WORDS.get(gate.word, ()) for name in note.names]
    # Skipped weights are not among those that were worked on.
    whole += len(names) if gate.word == "skips" else 0
    amount = 100 * len(names) / max(1, whole) if gate.percent else len(names)
    if not names or amount <= gate.limit:
        return []
    return [_problem(gate, f"{len(names)} of {whole}" + (f", {amount:.2g}%" if gate.percent else ""), names, where)]


def _problem(gate: Gate, got: str, names: list[str], where: str) -> Problem:
    limit = f"at most {gate.limit:g}{'%' if gate.percent else ''}"
    do = "choose other options, or allow more: what was done is kept"
    return Problem(f"{where}: --fail-on {gate}", limit, f"{got}: {few(names)}", do)
