"""Lessons and schedule: who trains on what and when, which tokens count, and how fast."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from compress.contract.tasks import TrainingBatch
from compress.contract.training_options import TrainingOptions
from compress.corpus import Corpus
from compress.errors import InputError
from compress.executors.train.sample_order import SampleOrder

LENGTH = 12


def streams(samples: int = 7) -> Corpus:
    """As packing concatenate makes them: every token counts."""
    ids = torch.randint(3, 99, (samples, LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Corpus({"input_ids": ids})


def padded(samples: int = 7) -> Corpus:
    """As packing pad makes them: samples of 1, 3, 5, ... tokens, on the left, and one in the middle of its padding."""
    corpus = streams(samples)
    mask = torch.zeros(samples, LENGTH, dtype=torch.uint8)
    for row in range(samples):
        mask[row, : min(LENGTH, 2 * row + 1)] = 1
    mask[-1] = 0
    mask[-1, 4:9] = 1
    return Corpus({**corpus.tensors, "attention_mask": mask})


def documents(samples: int = 7) -> Corpus:
    """As packing documents makes them: texts of 3, 4 and 5 tokens in a row, in another order in each sample."""
    lengths = [3, 4, 5]
    places = [torch.cat([torch.arange(n) for n in lengths[row % 3 :] + lengths[: row % 3]]) for row in range(samples)]
    return Corpus({**streams(samples).tensors, "position_ids": torch.stack(places)})


def order_of(corpus: Corpus, seed: int = 0, causal: bool = True, **how: Any) -> SampleOrder:
    return SampleOrder(corpus, TrainingOptions(**{"batch": 3, "micro_batch": 2, **how}), seed, causal=causal)


@pytest.mark.parametrize("corpus", [streams(), padded(), documents()])
def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own(corpus: Corpus) -> None:
    found = order_of(corpus, batch=7, epochs=4)
    epochs = [found.of_step(step) for step in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize(("samples", "epochs", "batch"), [(7, 1, 3), (7, 3, 3), (6, 2, 4), (5, 2, 100), (8, 1, 1), (4, 2, 8)])
def test_steps_cover_all_epochs_and_the_last_may_be_smaller(samples: int, epochs: int, batch: int) -> None:
    found = order_of(streams(samples), epochs=epochs, batch=batch)
    steps = [found.of_step(step) for step in range(found.steps)]
    assert all(len(step) == batch for step in steps[:-1])
    assert 0 < len(steps[-1]) <= batch
    everything = [sample for step in steps for sample in step]
    assert len(everything) == samples * epochs
    for at in range(0, len(everything), samples):
        assert sorted(everything[at : at + samples]) == list(range(samples)), "no sample again before all others"
    assert found.of_step(found.steps) == []


def test_the_order_is_a_function_of_the_seed_and_the_tokens() -> None:
    def order(corpus: Corpus, seed: int) -> list[int]:
        found = order_of(corpus, seed, batch=5, epochs=3)
        return [sample for step in range(found.steps) for sample in found.of_step(step)]

    assert order(streams(), 1) == order(streams(), 1)
    assert order(streams(), 1) != order(streams(), 2)
    assert order(streams(), 1) != order(documents(), 1)


def test_a_step_needs_no_steps_before_it() -> None:
    """A run that goes on asks for its steps from the middle; a step over the end of an epoch has samples of both."""
    whole = order_of(streams(), epochs=3, batch=4)
    wanted = [whole.of_step(step) for step in range(whole.steps)]
    assert [order_of(streams(), epochs=3, batch=4).of_step(step) for step in range(whole.steps)] == wanted
    assert [whole.of_step(step) for step in reversed(range(whole.steps))] == wanted[::-1]


def oracle(corpus: Corpus, row: int) -> list[tuple[int, int]]:
    """(position, the token it should predict) of a sample, by asking of each token which text it is of."""
    ids, mask, places = (corpus.tensors.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    assert ids is not None
    texts, number = [], 0
    for at in range(LENGTH):
        if places is not None and int(places[row, at]) == 0:
            number += 1
        texts.append(None if mask is not None and not mask[row, at] else number)
    pairs = pairwise(range(LENGTH))
    return [(here, int(ids[row, after])) for here, after in pairs if texts[here] is not None and texts[here] == texts[after]]


def scored(batch: TrainingBatch) -> list[tuple[int, int]]:
    return list(zip(batch.positions.tolist(), batch.labels.tolist(), strict=True))


@pytest.mark.parametrize("corpus", [streams(), padded(), documents()])
def test_a_token_counts_if_the_next_one_is_of_the_same_text(corpus: Corpus) -> None:
    found = order_of(corpus)
    for row in range(7):
        assert scored(found.batch([row])) == oracle(corpus, row)
        assert found.tokens([row]) == len(oracle(corpus, row))
    several = [5, 0, 3]
    wanted = [(at * LENGTH + position, label) for at, row in enumerate(several) for position, label in oracle(corpus, row)]
    assert scored(found.batch(several)) == wanted
    assert found.tokens(several) == len(wanted)


def test_of_streams_all_but_the_last_token_count() -> None:
    assert order_of(streams()).tokens([0, 1]) == 2 * (LENGTH - 1)


def test_padding_neither_predicts_nor_is_predicted() -> None:
    corpus = padded()
    batch = order_of(corpus).batch(list(range(7)))
    mask = corpus.tensors["attention_mask"].bool().flatten()
    assert bool(mask[batch.positions].all())
    assert bool(mask[batch.positions + 1].all())
    assert order_of(corpus).tokens([0]) == 0, "a text of one token predicts nothing"


def test_the_first_token_of_a_text_is_never_a_label() -> None:
    corpus = documents()
    batch = order_of(corpus).batch(list(range(7)))
    assert not bool((corpus.tensors["position_ids"].flatten()[batch.positions + 1] == 0).any())
    assert len(batch.labels) == 7 * (LENGTH - 3)


def test_a_masked_model_answers_for_every_token_it_sees() -> None:
    corpus = padded()
    found = order_of(corpus, causal=False)
    for row in range(7):
        seen = corpus.tensors["attention_mask"][row].nonzero()[:, 0].tolist()
        assert scored(found.batch([row])) == [(at, int(corpus.tensors["input_ids"][row, at])) for at in seen]


def test_a_batch_gives_the_model_what_it_needs_and_no_more() -> None:
    """Masks only where there is padding, and positions without a mask, which would join texts."""
    assert order_of(streams()).batch([0, 1]).inputs.keys() == {"input_ids"}
    assert order_of(documents()).batch([0, 1]).inputs.keys() == {"input_ids", "position_ids"}
    corpus = padded(8)
    with_mask = order_of(corpus).batch([0, 7]).inputs
    assert with_mask.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(with_mask["attention_mask"], corpus.tensors["attention_mask"][[0, 7]].long())
    assert order_of(corpus).batch([6]).inputs.keys() == {"input_ids"}, "a sample without padding"
    assert with_mask["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("corpus", [streams(), padded(), documents()])
def test_all_processes_together_have_the_samples_of_the_step(corpus: Corpus, world_size: int, micro_batch: int) -> None:
    found = order_of(corpus, batch=5, micro_batch=micro_batch)
    for step in range(found.steps):
        shares = [list(found.share(step, rank, world_size)) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1, "as many micro-batches on every process, or they wait for ever"
        rows: list[list[int]] = []
        labels = 0
        for share in shares:
            assert [last for _, last in share] == [False] * (len(share) - 1) + [True]
            for batch, _ in share:
                assert len(batch.inputs["input_ids"]) <= micro_batch
                labels += len(batch.labels)
                if len(batch.labels) or found.tokens(found.of_step(step)) == 0:
                    rows += batch.inputs["input_ids"].tolist()
        wanted = [found.ids[row].tolist() for row in found.of_step(step) if found.tokens([row])]
        assert sorted(row for row in rows if row in wanted) == sorted(wanted)
        assert labels == found.tokens(found.of_step(step))


def test_a_process_without_samples_gets_a_batch_that_counts_nothing() -> None:
    found = order_of(streams(), batch=3, micro_batch=2)
    (first, _), (second, _) = (next(iter(found.share(0, rank, 3))) for rank in (0, 2))
    assert len(first.labels) == 2 * (LENGTH - 1)
    assert second.inputs["input_ids"].shape == (1, LENGTH), "it has a forward, and so takes part in the gradient"
    assert len(second.labels) == len(second.positions) == 0
    assert second.positions.dtype == torch.int64


def test_a_row_of_several_texts_is_found() -> None:
    assert order_of(streams()).joined() is None
    assert order_of(padded()).joined() is None
    alone = Corpus({**streams().tensors, "position_ids": torch.arange(LENGTH).expand(7, -1)})
    assert order_of(alone).joined() is None
    row = order_of(documents()).joined()
    assert row is not None
    assert int((row.inputs["position_ids"] == 0).sum()) == 3


@pytest.mark.parametrize("name", ["input_features", "decoder_input_ids"])
def test_what_is_no_text_is_refused(name: str) -> None:
    tensors = {**streams().tensors, name: torch.zeros(7, 4)}
    with pytest.raises(InputError, match="train on texts"):
        order_of(Corpus(tensors))
    with pytest.raises(InputError, match="train on texts"):
        order_of(Corpus({name: torch.zeros(7, 4)}))


CURVES = ["cosine", "linear", "constant"]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 10, 101])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_rate_rises_then_falls_and_is_never_above_the_highest(curve: Any, warmup: float, steps: int, final: float) -> None:
    how = TrainingOptions(curve=curve, warmup=warmup, final=final)
    rates = [how.rate(step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates), "no step for nothing"
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1
    assert all(rate >= min(final, rates[0]) for rate in rates)
    if curve == "constant":
        assert all(rate == 1 for rate in rates[top:])


@pytest.mark.parametrize(
    ("curve", "wanted"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [0.5] + [1.0] * 9),
        ("cosine", [0.5, 1.0, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
    ],
)
def test_ten_steps_with_a_fifth_of_warming_up(curve: Any, wanted: list[float]) -> None:
    how = TrainingOptions(curve=curve, warmup=0.2)
    assert [how.rate(step, 10) for step in range(10)] == pytest.approx(wanted, abs=1e-4)


def test_it_falls_towards_final() -> None:
    for curve in ("cosine", "linear"):
        how = TrainingOptions(curve=curve, warmup=0.0, final=0.2)
        rates = [how.rate(step, 1000) for step in range(1000)]
        assert 0.2 < rates[-1] < 0.202
        assert how.rate(1000, 1000) == pytest.approx(0.2)


def test_texts_without_a_token_to_predict_are_refused() -> None:
    """Not trained on in silence, at a loss of 0 for nothing."""
    mask = torch.zeros(7, LENGTH, dtype=torch.uint8)
    mask[:, 0] = 1
    with pytest.raises(InputError, match="token"):
        order_of(Corpus({**streams().tensors, "attention_mask": mask}))
