"""Perplexity and KL of an artifact to its source, with the protocol.

Windows of `length` tokens without overlap, no BOS added, the first token of a window not scored, fp32. An encoder-decoder
reads the first half of a window and is scored on the second; a masked language model is compared at every token and has no
perplexity. Both models run side by side, block by block; nothing but numbers per token is kept.

Every number has a standard error that assumes independent windows. For a mean it is the spread of its windows' means over the
root of their number; for a perplexity that of its logarithm, times itself; for a quantile half the distance between the
quantiles that lie a standard error of its share away on either side (Woodruff 1952).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from compress.device import CPU
from compress.errors import InputError, UsageError
from compress.evaluate.records import Spread
from compress.layerwise.logits import Forward
from compress.layerwise.side_by_side import BATCH_TOKENS, LOGIT_BYTES, logits_of

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint

_CHUNK = 1 << 20
"""Logits that are compared at a time, so that temporaries fit a cache."""
_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_EDGES = tuple(float(f"{10 ** (step / 5):.4g}") for step in range(-30, 9))
"""Nats per token between which tokens are counted: five steps a decade, from 1e-6 on."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; NaN for one that does not exist, such as the error of a single window."""

    value: float = math.nan
    error: float = math.nan


@dataclass(frozen=True)
class Quality:
    """What `compare` found; KL(source || artifact) in nats per token."""

    tokens: int
    length: int
    scored: int
    """Tokens that count."""
    scoring: str
    perplexity: Estimate
    """Perplexity of the artifact; a masked language model has none."""
    source_perplexity: Estimate = Estimate()
    kl: Estimate = Estimate()
    kl_median: Estimate = Estimate()
    kl_p99: Estimate = Estimate()
    top1: Estimate = Estimate()
    """Share of scored tokens for which both models have the same likeliest token."""
    spread: Spread | None = None
    """How KL is spread over tokens."""

    @property
    def protocol(self) -> str:
        return f"first {self.tokens:,} tokens, windows of {self.length} without overlap, fp32, no BOS, {self.scoring}"


def compare(
    source: Checkpoint | None, artifact: Checkpoint, windows: torch.Tensor, batch: int | None = None,
    progress: Callable[[float], None] = lambda share: None, device: torch.device = CPU,
) -> Quality:  # fmt: skip
    """Measures `artifact` on `windows` [count, length], against `source` if there is one. Raises CompressError.

    `batch` windows go through a model at a time, fewer where their logits would be too many.
    """
    sides = [Forward(checkpoint, device=device) for checkpoint in (source, artifact) if checkpoint is not None]
    _check(sides, windows)
    length, last = windows.shape[1], sides[-1]
    # Several batches go through a block at once, on a few cores each: an operation on all cores waits for the slowest core.
    threads, at_once = torch.get_num_threads(), max(1, BATCH_TOKENS // length)
    most = 1 if batch or device.type != "cpu" else min(threads, at_once, len(windows))
    count = max(n for n in range(1, most + 1) if threads % n == 0)
    fit = batch or min(at_once // count, -(-len(windows) // count))
    batches = list(windows.split(min(fit, max(1, LOGIT_BYTES // (4 * length * last.vocabulary)))))
    tally = _Tally(sides)
    with torch.no_grad():
        for ids, logits, team in logits_of(sides, batches, count, progress):
            tally.add(ids, logits, team)
            del logits  # before the next ones are computed
    return tally.quality(windows)


def _check(sides: list[Forward], windows: torch.Tensor) -> None:
    """Raises CompressError for models that cannot be compared, or cannot run on these windows."""
    first, last = sides[0], sides[-1]
    length, most = windows.shape[1], int(windows.max())
    if (first.encoder_decoder, first.causal) != (last.encoder_decoder, last.causal):
        kinds = [type(side.model).__name__ for side in (first, last)]
        raise InputError(last.label, f"a model that is scored as {first.label} is, a {kinds[0]}", f"a {kinds[1]}")
    if first.vocabulary != last.vocabulary:
        expected = f"a vocabulary of {first.vocabulary:,}, as {first.label} has"
        raise InputError(last.label, expected, f"{last.vocabulary:,}", "measure it against the model that it was made from")
    if most >= first.vocabulary:
        do = "use the tokenizer that belongs to the model"
        raise InputError(first.label, f"ids below {first.vocabulary:,}, the size of its vocabulary", f"the id {most}", do)
    least = 4 if first.encoder_decoder else 2
    if length < least:
        raise UsageError("length", f"at least {least}", f"{length}", "256 is usual")
    for side in sides:
        # In an encoder-decoder each side gets half of a window.
        factor = 2 if side.encoder_decoder else 1
        positions = side.positions()
        if positions is not None and -(-length // factor) > positions:
            expected = f"at most {factor * positions}, for {side.label} has {positions} positions"
            raise UsageError("length", expected, f"{length}", f"set length to {factor * positions} or less")


class _Tally:
    """Numbers for every scored token: the surprise of each side; for two sides also KL and whether their top-1 agree."""

    def __init__(self, sides: list[Forward]) -> None:
        self.sides = sides
        self.found: list[torch.Tensor] = []

    def add(self, ids: torch.Tensor, logits: list[torch.Tensor], team: Executor | None) -> None:
        """Adds the numbers of windows `ids`, from the logits of each side."""
        first, last = self.sides[0], self.sides[-1]
        if len(sizes := {part.shape[-1] for part in logits}) > 1:
            raise InputError(last.label, f"logits for as many tokens as {first.label} has", " and ".join(map(str, sizes)))
        if first.encoder_decoder:
            ids = ids[:, ids.shape[1] // 2 :]
        # For a masked model the target only serves to check that its logits are finite.
        targets = (ids[:, 1:] if first.causal else ids).to(logits[0].device)
        scored = targets.shape[1]
        # One tensor for all numbers: many small ones would fragment the memory.
        numbers = torch.empty(4 if len(logits) == 2 else 1, *targets.shape, device=targets.device)
        step = max(1, _CHUNK // logits[0].shape[-1])
        places = [(window, slice(at, min(at + step, scored))) for window in range(len(ids)) for at in range(0, scored, step)]

        def fill(place: tuple[int, slice]) -> None:
            _rows([part[place] for part in logits], targets[place], numbers[:, *place])

        for _ in (map if team is None else team.map)(fill, places):
            pass
        for side, surprise in zip(self.sides, numbers, strict=False):
            if bool(surprise.isnan().any()):
                do = "its weights are damaged; compress diff shows which"
                raise InputError(side.label, "logits that are numbers", "NaN", do)
        self.found.append(numbers.cpu())

    def quality(self, windows: torch.Tensor) -> Quality:
        """The numbers."""
        side = self.sides[0]
        scoring = "first token of a window not scored"
        if side.encoder_decoder:
            scoring = "first half of a window to the encoder, second to the decoder, whose first token is not scored"
        if not side.causal:
            scoring = "every token compared, none masked (no perplexity: the model sees the token itself)"
        if self.sides[-1].rounds_cache:
            scoring += ", keys and values rounded to FP8 by the artifact's scales"
        numbers = torch.cat(self.found, dim=1)
        perplexities = [perplexity(part) if side.causal else Estimate() for part in numbers[: len(self.sides)]]
        found = Quality(windows.numel(), windows.shape[1], numbers[0].numel(), scoring, perplexities[-1])
        if len(self.sides) == 1:
            return found
        kl, same = numbers[2:]
        return replace(
            found, source_perplexity=perplexities[0], kl=mean(kl), kl_median=quantile(kl, 0.5), kl_p99=quantile(kl, 0.99),
            top1=mean(same), spread=spread(kl),
        )  # fmt: skip


@torch.no_grad()
def _rows(logits: list[torch.Tensor], targets: torch.Tensor, out: torch.Tensor) -> None:
    """Fills `out` [.., tokens] from logits [tokens, vocabulary] of each side."""
    logs = [part.float().log_softmax(-1) for part in logits]
    for number, log in enumerate(logs):
        out[number] = -log.gather(-1, targets[:, None])[:, 0]
    if len(logs) == 2:
        p, q = logs
        # `max` gives the index several times faster than `argmax`.
        out[3] = logits[0].max(-1).indices == logits[1].max(-1).indices
        cost = torch.sub(p, q, out=q)
        out[2] = p.exp().mul_(cost).sum(-1)
        if bool(out[2].isnan().any()):
            # A token that the source gives probability 0 adds nothing, whatever the artifact's probability.
            out[2] = (p.exp() * cost).masked_fill_(p == -math.inf, 0).sum(-1)


def mean(numbers: torch.Tensor) -> Estimate:
    """The mean of [windows, tokens]."""
    windows = numbers.double().mean(-1)
    return Estimate(float(windows.mean()), _error(windows))


def perplexity(surprise: torch.Tensor) -> Estimate:
    """exp of the mean surprise."""
    found = mean(surprise)
    value = math.exp(found.value) if found.value < 700 else math.inf
    return Estimate(value, value * found.error)


def quantile(numbers: torch.Tensor, share: float) -> Estimate:
    """The quantile `share` of [windows, tokens], interpolated."""
    ordered = numbers.double().flatten().sort().values

    def at(position: float) -> float:
        place = min(max(position, 0.0), 1.0) * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return float(low + (high - low) * (place - math.floor(place))) if low != high else float(low)

    value = at(share)
    error = _error((numbers.double() <= value).double().mean(-1))
    return Estimate(value, (at(share + error) - at(share - error)) / 2 if len(numbers) > 1 else math.nan)


def spread(numbers: torch.Tensor) -> Spread:
    """Quantiles and counts of [windows, tokens]; what lies beyond the edges counts in the first and the last bin."""
    values = numbers.double().flatten()
    edges = torch.tensor(_EDGES, dtype=torch.float64)
    places = torch.bucketize(values, edges[1:-1], right=True)
    counts = torch.bincount(places, minlength=len(_EDGES) - 1).tolist()
    quantiles = {f"{share:g}": float(f"{quantile(numbers, share).value:.6g}") for share in _SHARES}
    finite = {share: value for share, value in quantiles.items() if math.isfinite(value)}
    return Spread(quantiles=finite, edges=_EDGES, counts=tuple(counts))


def _error(windows: torch.Tensor) -> float:
    return float(windows.std() / math.sqrt(len(windows))) if len(windows) > 1 else math.nan
