"""Sample order: the samples of each step, and which of their tokens count.

The order of samples is a function of the seed, the tokens and the epoch, and a step's samples are a range of it. So a run can
resume at any step without saved state, and every process knows the samples of the others: the number of scored tokens of a
step is known before it begins, and each token has the same weight however the step is divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from compress.contract.tasks import TrainingBatch
from compress.contract.training_options import TrainingOptions
from compress.corpus import Corpus
from compress.corpus.spec import shuffled
from compress.errors import InputError
from compress.layerwise.batches import followed


class SampleOrder:
    """The samples of a training run. Raises InputError for a corpus without a next token to predict."""

    def __init__(self, corpus: Corpus, training_options: TrainingOptions, seed: int, *, causal: bool) -> None:
        ids = corpus.tensors.get("input_ids")
        if ids is None or corpus.tensors.keys() - {"input_ids", "attention_mask", "position_ids"}:
            got = ", ".join(sorted(corpus.tensors))
            raise InputError("training texts", "input_ids, with attention_mask or position_ids", got, "train on texts")
        self.ids = ids.long()
        self.mask = corpus.tensors.get("attention_mask", torch.ones_like(ids)).bool()
        self.places = corpus.tensors.get("position_ids")
        self.training_options, self.seed, self.causal = training_options, seed, causal
        self.digest, self.samples = corpus.digest, corpus.samples
        self.steps = training_options.steps(self.samples)
        self._epochs: dict[int, list[int]] = {}
        if not bool(self.scored.any()):
            raise InputError("training texts", "a token to predict", "none", "give longer texts, or samples of more tokens")

    @cached_property
    def scored(self) -> torch.Tensor:
        """Which logits are scored, bool [samples, length]: in a causal model those whose next token is in the same text."""
        return followed(self.mask, self.places) if self.causal else self.mask

    def of_step(self, step: int) -> list[int]:
        """The samples of a step."""
        start = step * self.training_options.batch
        stop = min(start + self.training_options.batch, self.samples * self.training_options.epochs)
        return [self._epoch(at // self.samples)[at % self.samples] for at in range(start, stop)]

    def _epoch(self, number: int) -> list[int]:
        if number not in self._epochs:
            self._epochs = {number: list(shuffled(self.samples, f"{self.seed}/{self.digest}/epoch/{number}"))}
        return self._epochs[number]

    def tokens(self, samples: list[int]) -> int:
        """The number of scored tokens in these samples."""
        return int(self.scored[samples].sum())

    def share(self, step: int, rank: int, world_size: int) -> Iterator[tuple[TrainingBatch, bool]]:
        """A process's micro-batches of a step, each with whether it is the last. All processes get as many, some maybe empty."""
        samples, size = self.of_step(step), self.training_options.micro_batch
        parts = [samples[at : at + size] for at in range(0, len(samples), size)]
        rounds = -(-len(parts) // world_size)
        for number in range(rounds):
            at = number * world_size + rank
            batch = self.batch(parts[at]) if at < len(parts) else self.empty(samples[0])
            yield batch, number == rounds - 1

    def batch(self, samples: list[int]) -> TrainingBatch:
        """The model's arguments for some samples."""
        ids, mask, scored = self.ids[samples], self.mask[samples], self.scored[samples]
        inputs = {"input_ids": ids}
        if self.places is not None:
            # If there is no mask, transformers takes positions that restart at 0 for separate texts.
            inputs["position_ids"] = self.places[samples]
        elif not bool(mask.all()):
            inputs["attention_mask"] = mask.long()
        positions = scored.flatten().nonzero()[:, 0]
        following = ids.roll(-1, dims=1) if self.causal else ids
        return TrainingBatch(inputs, positions, following.flatten()[positions])

    def empty(self, sample: int) -> TrainingBatch:
        """A batch without scored tokens, for a process that has no samples left while others do."""
        batch = self.batch([sample])
        return TrainingBatch(batch.inputs, batch.positions[:0], batch.labels[:0])

    def joined(self) -> TrainingBatch | None:
        """A sample of several texts, to check that the model keeps them apart; None if there is none."""
        if self.places is None:
            return None
        several = ((self.places[:, 1:] == 0).any(1)).nonzero()[:, 0]
        return self.batch([int(several[0])]) if len(several) else None
