"""Knowledge: facts as files have them, candidates, and what a model is said to know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.reader import open_checkpoint
from compress.errors import InputError
from compress.evaluate.knowledge import OWN, Answer, Fact, Quiz, read_facts
from support import load


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_lamas_forms_are_read(tmp_path: Path) -> None:
    relations = written(tmp_path / "relations.jsonl", {"relation": "P36", "template": "The capital of [X] is [Y] ."})
    file = written(
        tmp_path / "facts.jsonl",
        {"predicate_id": "P36", "sub_label": "France", "obj_label": "Paris"},
        {"pred": "IsA", "masked_sentences": ["A cat is a kind of [MASK]."], "obj_label": "animal"},
        {"obj_label": "1879", "evidences": [{"masked_sentence": "He was born in [MASK] in Ulm."}]},
        "",
        {"relation": "r", "template": "[Y] wrote [X].", "sub_label": "Faust", "obj_label": "Goethe"},
    )
    assert read_facts(file, relations) == [
        Fact("P36", "The capital of France is", "Paris", " .", "France"),
        Fact("IsA", "A cat is a kind of", "animal", "."),
        Fact("facts", "He was born in", "1879", " in Ulm."),
        Fact("r", "", "Goethe", " wrote Faust.", "Faust"),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"masked_sentence": "a [MASK]"}, "the object as `obj_label`"),
        ({"obj_label": "b", "masked_sentence": "no mask"}, r"one \[MASK\]\n.*'no mask'"),
        ({"obj_label": "b", "masked_sentence": "[MASK] [MASK]"}, "a sentence with one .MASK."),
        ({"obj_label": "b", "sub_label": "a"}, "--relations"),
        ("{", "expected: a JSON object"),
        ("[1]", r"got: +list"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_facts(written(tmp_path / "facts.jsonl", {"obj_label": "b", "masked_sentence": "a [MASK]"}, row))
    assert "line 2" in str(caught.value)


def test_a_file_without_facts_is_refused(tmp_path: Path) -> None:
    for file in (written(tmp_path / "empty.jsonl", ""), tmp_path / "missing.jsonl"):
        with pytest.raises(InputError, match=file.name):
            read_facts(file)


def test_our_own_facts_are_whole() -> None:
    facts = read_facts(OWN)
    assert len(facts) == len({(fact.relation, fact.before) for fact in facts}) > 150
    assert all(fact.before and fact.after.strip() == "." for fact in facts)
    quiz = Quiz(facts)
    assert min(len(choices) for choices in quiz.candidates) >= 5


def test_candidates_are_of_the_relation_and_drawn_by_a_seed() -> None:
    facts = [Fact("a", f"{n} is", f"object {n}", ".") for n in range(30)] + [Fact("b", "x is", "other", ".")]
    quiz = Quiz(facts, most=10)
    assert all(choices[0] == fact.object for choices, fact in zip(quiz.candidates, facts))
    assert [len(choices) for choices in quiz.candidates] == [10] * 30 + [1]
    assert all(len(set(choices)) == len(choices) for choices in quiz.candidates)
    assert Quiz(facts, most=10).candidates == quiz.candidates
    assert Quiz(facts, most=10, seed=1).candidates != quiz.candidates
    assert {len(choices) for choices in Quiz(facts[:30]).candidates} == {30}


def test_answers_are_those_of_the_whole_model(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    facts = [Fact("r", "import", word, "\n") for word in ("os", "json", "sys")] + [Fact("r", "", "def", " f():")]
    quiz = Quiz(facts)
    found = quiz.answers(open_checkpoint(demo_model), demo_model)
    model, tokenizer = load(demo_model, dtype=torch.float32), AutoTokenizer.from_pretrained(demo_model)
    begin = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    for fact, choices, answer in zip(facts, quiz.candidates, found):
        logs = []
        for choice in choices:
            ids = [begin, *tokenizer(f"{fact.before} {choice}{fact.after}".lstrip(), add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                log = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            logs.append(float(log.gather(-1, torch.tensor(ids[1:])[:, None]).sum()))
        # The context is the same for all, so whole sentences are ranked as what follows it is.
        assert answer.best == choices[max(range(len(logs)), key=logs.__getitem__)]
        assert answer.probability == pytest.approx(float(torch.tensor(logs).softmax(0)[0]), rel=1e-3)


def test_reports_count_what_was_lost_and_gained() -> None:
    quiz = Quiz([Fact("a", "1", "x", "."), Fact("a", "2", "y", "."), Fact("b", "3", "z", "."), Fact("b", "4", "w", ".")])
    source = [Answer("x", 0.5), Answer("y", 0.5), Answer("w", 0.25), Answer("w", 1.0)]
    ours = [Answer("y", 0.1), Answer("y", 0.9), Answer("z", 0.5), Answer("w", 1.0)]
    a, b, all_ = quiz.reports(ours, source)
    assert (a.relation, a.facts, a.candidates, a.known, a.source_known, a.lost, a.gained) == ("a", 2, 2, 1, 2, 1, 0)
    assert (b.known, b.source_known, b.lost, b.gained) == (2, 1, 0, 1)
    assert (all_.relation, all_.facts, all_.known, all_.source_known, all_.lost, all_.gained) == ("all", 4, 3, 3, 1, 1)
    assert a.probability == pytest.approx(math.sqrt(0.1 * 0.9))
    assert quiz.reports(ours, None)[-1].source_known is None
