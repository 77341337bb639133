"""Domain order: draws follow the weights, no sample comes again before the others, and any step can be asked for."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from compress.contract.domain_options import DomainOptions
from compress.contract.training_options import TrainingOptions
from compress.corpus import Corpus, SourceRecord
from compress.errors import InputError
from compress.executors.train.domain_order import DomainOrder

LENGTH = 6


def corpus(*pools: int, held: int = 2, seed: int = 0) -> Corpus:
    """Domains with so many samples to train on."""
    domain = torch.cat([torch.full((held + pool,), number, dtype=torch.int32) for number, pool in enumerate(pools)])
    held_out = torch.cat([torch.arange(held + pool) < held for pool in pools])
    ids = torch.randint(3, 99, (len(domain), LENGTH), generator=torch.Generator().manual_seed(seed))
    sources = tuple(SourceRecord(f"{number}.jsonl", held + pool, 1, 1) for number, pool in enumerate(pools))
    return Corpus({"input_ids": ids, "domain": domain, "held_out": held_out}, sources)


def order_of(
    found: Corpus, weights: tuple[float, ...], samples: int = 40, every: int = 5, seed: int = 0, **how: Any
) -> DomainOrder:
    options = TrainingOptions(**{"batch": 4, "micro_batch": 2, **how})
    return DomainOrder(found, options, seed, DomainOptions("paper", every, samples, weights), causal=True)


def domains_in(order: DomainOrder, samples: list[int]) -> list[int]:
    return [next(number for number, pool in enumerate(order.pools) if sample in pool) for sample in samples]


def test_draws_are_as_frequent_as_the_weights_say() -> None:
    """Chi-square with 3 degrees of freedom: 16.3 is exceeded once in a thousand seeds, and the seed is fixed."""
    weights, count = (0.4, 0.3, 0.25, 0.05), 8000
    order = order_of(corpus(50, 40, 30, 20), weights, count, every=10_000, batch=16)
    found = Counter(domain for step in range(order.steps) for domain in domains_in(order, order.of_step(step)))
    assert sum(found.values()) == count
    chi_square = sum((found[i] - count * weight) ** 2 / (count * weight) for i, weight in enumerate(weights))
    assert chi_square < 16.3
    # Nor does one draw tell of the next.
    drawn = [domain for step in range(order.steps) for domain in order._domains(step)]
    pairs = Counter(pairwise(drawn))
    expected = {(a, b): (count - 1) * weights[a] * weights[b] for a in range(4) for b in range(4)}
    assert sum((pairs[pair] - wanted) ** 2 / wanted for pair, wanted in expected.items()) < 37.7, "15 degrees of freedom"


def test_a_weight_of_zero_is_never_drawn() -> None:
    order = order_of(corpus(9, 9, 9), (0.0, 1.0, 0.0))
    assert {domain for step in range(5) for domain in order._domains(step)} == {1}


def test_no_sample_comes_again_before_the_others_of_its_domain() -> None:
    order = order_of(corpus(7, 300), (0.5, 0.5), samples=101, every=1000)
    drawn = [sample for step in range(order.steps) for sample in order.of_step(step)]
    assert len(drawn) == 101
    assert len(order.of_step(order.steps - 1)) == 1
    for pool in order.pools:
        own = [sample for sample in drawn if sample in pool]
        turns = [own[at : at + len(pool)] for at in range(0, len(own), len(pool))]
        assert all(sorted(turn) == pool for turn in turns[:-1])
        assert len(set(turns[-1])) == len(turns[-1])
    first = [sample for sample in drawn if sample in order.pools[0]]
    assert len(first) > 21
    assert len({tuple(first[at : at + 7]) for at in (0, 7, 14)}) == 3, "each turn in an order of its own"
    assert not set(drawn) & {sample for held in order.held_out for sample in held}
    assert order.drawn(order.steps) == [len(first), 101 - len(first)]


def test_any_step_can_be_asked_for() -> None:
    """A run that goes on knows the weights of the intervals before, and nothing else."""
    found, history = corpus(7, 11), [[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]
    whole = order_of(found, (0.5, 0.5), samples=60)
    whole.weights = history
    wanted = [whole.of_step(step) for step in range(15)]
    assert [whole.of_step(step) for step in reversed(range(15))] == wanted[::-1]
    for step in range(15):
        fresh = order_of(found, (0.5, 0.5), samples=60)
        fresh.weights = history
        assert fresh.of_step(step) == wanted[step]
        assert fresh.drawn(step) == whole.drawn(step)
    assert len({tuple(domains_in(whole, step)) for step in wanted}) > 5


def test_it_is_a_function_of_the_seed_and_the_tokens() -> None:
    def drawn(found: Corpus, seed: int) -> list[int]:
        order = order_of(found, (0.5, 0.5), seed=seed)
        return [sample for step in range(5) for sample in order.of_step(step)]

    assert drawn(corpus(30, 30), 1) == drawn(corpus(30, 30), 1)
    assert drawn(corpus(30, 30), 1) != drawn(corpus(30, 30), 2)
    assert drawn(corpus(30, 30), 1) != drawn(corpus(30, 30, seed=1), 1)


def test_the_draw_by_hand() -> None:
    """The first of the domains whose ends lie above 48 bits of a SHA-256."""
    order = order_of(corpus(9, 9, 9), (0.2, 0.5, 0.3))
    for step, place in ((0, 0), (0, 3), (4, 1)):
        digest = hashlib.sha256(f"0/{order.digest}/domain/{step}/{place}".encode()).hexdigest()
        lot = int(digest[:12], 16) / 2**48
        assert order._domains(step)[place] == (0 if lot < 0.2 else 1 if lot < 0.7 else 2)


def test_processes_share_a_step_and_know_its_tokens() -> None:
    order = order_of(corpus(9, 9), (0.5, 0.5), batch=5)
    samples = order.of_step(1)
    batches = [batch for rank in (0, 1) for batch, _ in order.share(1, rank, 2)]
    assert sum(len(batch.positions) for batch in batches) == order.tokens(samples) == 5 * (LENGTH - 1)


def test_a_domain_without_a_token_to_predict_is_refused_by_its_name() -> None:
    found = corpus(5, 5)
    mask = torch.ones_like(found.tensors["input_ids"], dtype=torch.bool)
    mask[(found.tensors["domain"] == 1) & ~found.tensors["held_out"], 1:] = False
    with pytest.raises(InputError, match=r"1\.jsonl") as error:
        order_of(Corpus({**found.tensors, "attention_mask": mask}, found.sources), (0.5, 0.5))
    assert "a token to predict" in str(error.value)
