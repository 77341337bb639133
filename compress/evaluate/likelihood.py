"""Log-likelihoods of continuations, with one block of the model in memory.

The checkpoint may be in any state. Sequences are batched by length and padded on the right: a causal model sees nothing of what
follows a token, so padding changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.device import CPU
from compress.errors import InputError, UsageError
from compress.layerwise.logits import Forward
from compress.layerwise.side_by_side import BATCH_TOKENS, LOGIT_BYTES, logits_of

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Continuation:
    """Token ids that are scored after others; both have at least one."""

    context: tuple[int, ...]
    words: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What the model is given: everything but the last token."""
        return (self.context + self.words)[:-1]


@dataclass(frozen=True)
class Score:
    """log p(words | context) in nats, and whether each of the words was the likeliest token."""

    log_likelihood: float
    greedy: bool


class Likelihoods:
    """Scores continuations in fp32. Raises InputError for a model that is no causal language model."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        self.side = Forward(checkpoint, device=device)
        if self.side.encoder_decoder or not self.side.causal:
            kind = type(self.side.model).__name__
            raise InputError(self.side.label, "a causal language model", kind, "measure perplexity and KL with --data")

    def of(self, asked: Sequence[Continuation], progress: Callable[[float], None] = lambda share: None) -> list[Score]:
        """A score for each of `asked`, in their order. Raises UsageError for one that is too long, InputError for NaN."""
        longest = max((len(one.read) for one in asked), default=0)
        positions = self.side.positions()
        if positions is not None and longest > positions:
            raise UsageError("continuation", f"at most {positions:,} tokens, the model's positions", f"{longest:,}", "shorten it")
        groups = self._batched(asked)
        found: dict[int, Score] = {}
        threads = torch.get_num_threads()
        count = threads if self.side.meta_model.device.type == "cpu" and len(groups) >= threads else 1
        with torch.no_grad():
            batches = [_padded([asked[number].read for number in group]) for group in groups]
            for group, (_, logits, _) in zip(groups, logits_of([self.side], batches, count, progress) if groups else ()):
                for row, number in enumerate(group):
                    found[number] = self._score(logits[0][row], asked[number])
                del logits  # before the next ones are computed
        return [found[number] for number in range(len(asked))]

    def _batched(self, asked: Sequence[Continuation]) -> list[list[int]]:
        """Numbers of `asked` by batch, the longest first."""
        groups: list[list[int]] = []
        most, width = min(BATCH_TOKENS, LOGIT_BYTES // (4 * self.side.vocabulary)), 0
        for number in sorted(range(len(asked)), key=lambda n: -len(asked[n].read)):
            if not groups or (len(groups[-1]) + 1) * width > most:
                groups.append([])
                width = len(asked[number].read)
            groups[-1].append(number)
        return groups

    def _score(self, logits: torch.Tensor, one: Continuation) -> Score:
        """The score from logits [tokens, vocabulary] of one sequence."""
        at = len(one.context) - 1
        log = logits[at : at + len(one.words)].float().log_softmax(-1)
        words = torch.tensor(one.words, device=log.device)
        sum_ = float(log.gather(-1, words[:, None]).double().sum())
        if sum_ != sum_:
            raise InputError(
                self.side.label, "logits that are numbers", "NaN", "its weights are damaged; compress diff shows which"
            )
        return Score(sum_, bool((log.max(-1).indices == words).all()))


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Ids [rows, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
