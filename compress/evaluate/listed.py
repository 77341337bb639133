"""Listed: a reader's log-probabilities of some tokens, beside our logits.

A reader that serves text tells the token that follows and the k likeliest. Legend: l what our logits say of these, l' what the
reader says, s the standard deviation of our logits over the vocabulary; all at one token of the text.

How far off the reader is there is rms(l' - l) / s: a share of what makes one token likelier than another.
"""

from __future__ import annotations

import torch


def of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [samples, length, k] of `tokens`, int64, by logits [samples, length, vocabulary]."""
    return logits.float().log_softmax(-1).gather(-1, tokens)


def typical(meant: torch.Tensor, found: torch.Tensor, tokens: torch.Tensor) -> float:
    """How far off the log-probabilities `found` are, at the median token; `meant` are logits."""
    away = (found - of(meant, tokens)).square().mean(-1).sqrt()
    return float((away / meant.float().std(-1)).median())


def divergence(meant: torch.Tensor, found: torch.Tensor, tokens: torch.Tensor) -> float:
    """KL(meaning || reader) over the k likeliest tokens of the reader, one by one, and all others together; mean, in nats."""
    # The first is the token that follows, which may be among the others.
    logs, p = found[..., 1:].double(), of(meant, tokens[..., 1:]).double().exp()
    rest, theirs = ((1 - x.sum(-1)).clamp_min(1e-12) for x in (p, logs.exp()))
    return float(((p * (p.log() - logs)).sum(-1) + rest * (rest / theirs).log()).mean())
