"""Knowledge: which facts a checkpoint still knows, relation by relation.

Petroni et al. 2019 (1909.01066) ask a model to fill the object of a fact into a sentence; so Namburi et al. 2023 (2312.00960)
measure what compression takes from a model's knowledge. Here a causal model ranks the objects of a relation (Kassner et al. 2021,
2102.00894) by the log-likelihood of the whole sentence, so an object of several tokens needs no rule of its own. A fact is known
if its own object is the likeliest.

Files are those of LAMA: a JSON object a line with `obj_label`, and a sentence with [MASK] (`masked_sentence`, `masked_sentences`,
or in `evidences`), or `sub_label` and a `template` with [X] and [Y], its own or that of its relation in a file of relations.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.device import CPU
from compress.errors import InputError
from compress.evaluate.likelihood import Continuation, Likelihoods
from compress.layerwise.eval_windows import plain_tokenizer

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint

OWN = Path(__file__).with_name("facts.jsonl")
"""Some 170 plain facts in twelve relations, written for this."""
_RELATION = ("predicate_id", "relation", "pred")


@dataclass(frozen=True)
class Fact:
    """A sentence before and after the object that is asked for."""

    relation: str
    before: str
    object: str
    after: str
    subject: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model said to a fact."""

    best: str
    """The object that it finds likeliest."""
    probability: float
    """Of the right object, among the candidates."""


@dataclass(frozen=True)
class RelationReport:
    """A relation under a model, and under the one that it is compared with."""

    relation: str
    facts: int
    candidates: int
    known: int
    source_known: int | None
    lost: int
    """Known to the source only."""
    gained: int
    probability: float
    """Geometric mean of the right object's, among the candidates."""
    source_probability: float | None


def read_facts(file: Path, relations: Path | None = None) -> list[Fact]:
    """The facts of a file. Raises InputError with the line that is wrong."""
    templates = {}
    if relations is not None:
        templates = {str(row.get("relation")): str(row.get("template", "")) for _, row in _rows(relations)}
    found = [_fact(f"{file}: line {number}", row, templates) for number, row in _rows(file)]
    if not found:
        raise InputError(str(file), "facts, one JSON object a line", "none", "give another file")
    return found


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file of JSON lines."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(file), "a .jsonl file in UTF-8", str(error), "name another file") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}: line {number}", "a JSON object", str(error), "repair the line") from None
            if not isinstance(row, dict):
                raise InputError(f"{file}: line {number}", "a JSON object", type(row).__name__, "repair the line")
            yield number, row


def _fact(where: str, row: dict[str, Any], templates: dict[str, str]) -> Fact:
    relation = next((str(row[key]) for key in _RELATION if row.get(key)), "facts")
    object_, subject = row.get("obj_label"), str(row.get("sub_label", ""))
    if not isinstance(object_, str) or not object_.strip():
        raise InputError(where, "the object as `obj_label`", f"{object_!r}", "see docs: compress knowledge")
    template = str(row.get("template") or templates.get(relation, ""))
    sentence = _masked(row)
    if template and subject:
        sentence = template.replace("[X]", subject).replace("[Y]", "[MASK]")
    if sentence.count("[MASK]") != 1:
        do = "give masked_sentence, or sub_label and a template with [X] and [Y]; LAMA's templates are a file of --relations"
        raise InputError(where, "a sentence with one [MASK]", f"'{sentence}'", do)
    before, after = sentence.split("[MASK]")
    return Fact(relation, before.rstrip(), object_.strip(), after, subject)


def _masked(row: dict[str, Any]) -> str:
    """The sentence with [MASK] of a row, empty if it has none."""
    sentence = row.get("masked_sentence") or row.get("masked_sentences")
    if not sentence and isinstance(evidences := row.get("evidences"), list):
        sentence = next((e["masked_sentence"] for e in evidences if isinstance(e, dict) and e.get("masked_sentence")), "")
    if isinstance(sentence, list):
        sentence = " ".join(map(str, sentence))
    return str(sentence or "")


class Quiz:
    """Facts, with the objects that each is to be chosen from."""

    def __init__(self, facts: Sequence[Fact], most: int = 100, seed: int = 0) -> None:
        self.facts = list(facts)
        objects: dict[str, list[str]] = {}
        for fact in self.facts:
            of = objects.setdefault(fact.relation, [])
            if fact.object not in of:
                of.append(fact.object)
        self.objects = objects
        self.candidates = [self._choices(fact, most, seed) for fact in self.facts]

    def _choices(self, fact: Fact, most: int, seed: int) -> list[str]:
        """The right object first, then others of its relation, drawn by a seed where there are more than `most`."""
        others = [o for o in self.objects[fact.relation] if o != fact.object]
        if len(others) >= most:
            others = random.Random(f"{seed} {fact.relation} {fact.before} {fact.object}").sample(others, most - 1)
        return [fact.object, *others]

    def answers(
        self, checkpoint: Checkpoint, folder: Path, progress: Callable[[float], None] = lambda share: None,
        device: torch.device = CPU, trusted: bool = False,
    ) -> list[Answer]:  # fmt: skip
        """What a model says to each fact. Raises InputError for one that is no causal language model."""
        tokenizer = plain_tokenizer(folder, trusted)
        begin = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        asked = []
        for fact, choices in zip(self.facts, self.candidates):
            # Every sentence begins with BOS, so that an object at its beginning has a context too.
            context = [begin, *ids(fact.before)]
            for choice in choices:
                whole = [begin, *ids(f"{fact.before} {choice}{fact.after}".lstrip())]
                same = next((n for n, (a, b) in enumerate(zip(context, whole)) if a != b), min(len(context), len(whole) - 1))
                asked.append(Continuation(tuple(whole[:same]), tuple(whole[same:])))
        scores = iter(Likelihoods(checkpoint, device).of(asked, progress))
        found = []
        for choices in self.candidates:
            logs = torch.tensor([next(scores).log_likelihood for _ in choices], dtype=torch.float64)
            found.append(Answer(choices[int(logs.argmax())], float(logs.softmax(0)[0])))
        return found

    def reports(self, ours: Sequence[Answer], theirs: Sequence[Answer] | None) -> list[RelationReport]:
        """Relation by relation, and all of them as the last one."""
        relations = [*self.objects, "all"]
        return [self._report(relation, ours, theirs) for relation in relations]

    def _report(self, relation: str, ours: Sequence[Answer], theirs: Sequence[Answer] | None) -> RelationReport:
        numbers = [n for n, fact in enumerate(self.facts) if relation in (fact.relation, "all")]
        known = {n for n in numbers if self.knows(n, ours)}
        before = {n for n in numbers if theirs is not None and self.knows(n, theirs)}

        def likely(answers: Sequence[Answer]) -> float:
            return math.exp(sum(math.log(max(answers[n].probability, 1e-300)) for n in numbers) / len(numbers))

        return RelationReport(
            relation, len(numbers), round(sum(len(self.candidates[n]) for n in numbers) / len(numbers)), len(known),
            len(before) if theirs is not None else None, len(before - known), len(known - before) if theirs is not None else 0,
            likely(ours), likely(theirs) if theirs is not None else None,
        )  # fmt: skip

    def knows(self, number: int, answers: Sequence[Answer]) -> bool:
        """Whether a fact's own object is the likeliest."""
        return answers[number].best == self.facts[number].object
