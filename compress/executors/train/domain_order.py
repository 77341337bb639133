"""Domain order: samples drawn from domains, by weights that change.

A draw is a function of the seed, the tokens, the step and the place in the step, and of the weights at that step; the sample is
the next of its domain in an order that the seed fixes, and after the last the domain begins again in another order. So every
process knows the samples of all, and a run resumes at any step from the weights of each interval alone: how many samples each
domain has given is counted again from them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate

from compress.contract.domain_options import DomainOptions
from compress.contract.train_pass import TrainPass
from compress.contract.training_options import TrainingOptions
from compress.corpus import Corpus, domain_names
from compress.corpus.domains import DOMAIN, HELD_OUT
from compress.corpus.spec import shuffled
from compress.errors import InputError
from compress.executors.step_run import StepRun
from compress.executors.train.sample_order import SampleOrder


def order_for(run: StepRun, pass_: TrainPass, *, causal: bool) -> SampleOrder:
    """The order of a run's samples: in shares that stay, or in shares of domains that move. Raises InputError."""
    corpus, options, domains = run.corpus(), pass_.training_options(), pass_.domains()
    if domains is None:
        return SampleOrder(corpus, options, run.ctx.seed, causal=causal)
    return DomainOrder(corpus, options, run.ctx.seed, domains, causal=causal)


class DomainOrder(SampleOrder):
    """The samples of a training run over domains. Raises InputError for a domain without a next token to predict."""

    def __init__(
        self, corpus: Corpus, training_options: TrainingOptions, seed: int, domains: DomainOptions, *, causal: bool
    ) -> None:
        if not causal:
            raise InputError("loading", "a model that predicts the next token", "a masked model", "set loading to static")
        own = {name: tensor for name, tensor in corpus.tensors.items() if name not in (DOMAIN, HELD_OUT)}
        super().__init__(Corpus(own, corpus.sources), training_options, seed, causal=causal)
        self.domains, self.names = domains, domain_names(corpus.sources)
        self.steps = -(-domains.samples // training_options.batch)
        domain, held = corpus.tensors[DOMAIN], corpus.tensors[HELD_OUT].bool()
        members = [domain == number for number in range(len(self.names))]
        self.pools = [(member & ~held).nonzero()[:, 0].tolist() for member in members]
        """The samples of each domain that are trained on."""
        self.held_out = [(member & held).nonzero()[:, 0].tolist() for member in members]
        for name, pool in zip(self.names, self.pools, strict=True):
            if not self.tokens(pool):
                do = "give longer texts, or samples of more tokens; or leave the source out"
                raise InputError(name, "a token to predict", "none", do)
        self.weights: list[list[float]] = [list(domains.weights)]
        """The weights of each interval so far."""
        self._turns: dict[tuple[int, int], list[int]] = {}
        self._reached: tuple[int, list[int]] = (0, [0] * len(self.names))

    def of_step(self, step: int) -> list[int]:
        drawn, found = self.drawn(step), []
        for domain in self._domains(step):
            found.append(self._sample(domain, drawn[domain]))
            drawn[domain] += 1
        return found

    def drawn(self, step: int) -> list[int]:
        """How many samples each domain has given before a step."""
        done, counts = self._reached if self._reached[0] <= step else (0, [0] * len(self.names))
        counts = counts.copy()
        for number in range(done, step):
            for domain in self._domains(number):
                counts[domain] += 1
        self._reached = (step, counts)
        return counts.copy()

    def _domains(self, step: int) -> list[int]:
        """The domain of each sample of a step."""
        batch = self.training_options.batch
        ends = list(accumulate(self.weights[step // self.domains.every]))
        places = range(min(batch, max(0, self.domains.samples - step * batch)))
        # A draw of exactly the sum would be past the last domain.
        return [min(bisect_right(ends, self._lot(step, place) * ends[-1]), len(ends) - 1) for place in places]

    def _lot(self, step: int, place: int) -> float:
        """A number from 0 to below 1."""
        digest = hashlib.sha256(f"{self.seed}/{self.digest}/domain/{step}/{place}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)

    def _sample(self, domain: int, number: int) -> int:
        """The sample that a domain gives after so many."""
        pool = self.pools[domain]
        turn, at = divmod(number, len(pool))
        if (domain, turn) not in self._turns:
            self._turns.pop((domain, turn - 2), None)
            order = shuffled(len(pool), f"{self.seed}/{self.digest}/domain/{domain}/{turn}")
            self._turns[domain, turn] = [pool[place] for place in order]
        return self._turns[domain, turn][at]
