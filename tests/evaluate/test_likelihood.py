"""Log-likelihoods block by block: against a whole model, unpadded, one sequence at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from compress.checkpoint.reader import open_checkpoint
from compress.errors import InputError, UsageError
from compress.evaluate import likelihood
from compress.evaluate.likelihood import Continuation, Likelihoods
from compress.threads import compute_threads
from families import build
from support import load, tiny_llama


def asked(count: int, vocabulary: int, seed: int = 0) -> list[Continuation]:
    """Continuations of 1 to 9 tokens after contexts of 1 to 20."""
    draw = random.Random(seed)
    ids = [[draw.randrange(vocabulary) for _ in range(draw.randint(2, 29))] for _ in range(count)]
    cuts = [draw.randint(max(1, len(row) - 9), len(row) - 1) for row in ids]
    return [Continuation(tuple(row[:cut]), tuple(row[cut:])) for row, cut in zip(ids, cuts)]


@torch.no_grad()
def oracle(directory: Path, one: Continuation) -> tuple[float, bool]:
    model = load(directory, dtype=torch.float32)
    logits = model(torch.tensor([[*one.context, *one.words]])).logits[0, len(one.context) - 1 : -1].double()
    log, words = logits.log_softmax(-1), torch.tensor(one.words)
    return float(log.gather(-1, words[:, None]).sum()), bool((logits.argmax(-1) == words).all())


@pytest.mark.parametrize("threads", [1, 2])
def test_scores_are_those_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    model = tiny_llama(tmp_path / "model")
    questions = asked(17, 128)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 96)  # several batches, of different lengths
    shares: list[float] = []
    with compute_threads(threads):
        found = Likelihoods(open_checkpoint(model)).of(questions, shares.append)
    for one, score in zip(questions, found):
        value, greedy = oracle(model, one)
        assert score.log_likelihood == pytest.approx(value, abs=1e-4)
        assert score.greedy == greedy
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_likeliest_tokens_are_told(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    with torch.no_grad():
        best = load(model, dtype=torch.float32)(torch.tensor([[5, 6, 7]])).logits[0, -1].argsort(descending=True)
    first, second = (Continuation((5, 6, 7), (int(token),)) for token in best[:2])
    found = Likelihoods(open_checkpoint(model)).of([first, second])
    assert [score.greedy for score in found] == [True, False]
    assert found[0].log_likelihood >= found[1].log_likelihood


def test_nothing_asked_is_nothing_found(tmp_path: Path) -> None:
    assert Likelihoods(open_checkpoint(tiny_llama(tmp_path / "model"))).of([]) == []


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    scorer = Likelihoods(open_checkpoint(tiny_llama(tmp_path / "model", max_position_embeddings=16)))
    with pytest.raises(UsageError, match="at most 16 tokens, the model's positions"):
        scorer.of([Continuation(tuple(range(16)), (1,)), Continuation(tuple(range(16)), (1, 2))])
    with pytest.raises(InputError, match="a causal language model"):
        Likelihoods(open_checkpoint(build("t5", tmp_path / "t5")))
