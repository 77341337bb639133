"""Divergence: how far a student's next-token distribution is from its teacher's.

Legend: p teacher, q student, both softmax(logits / T) over V tokens; a the mix of skew, b that of JSD; k of top-k.

    forward       KL(p || q)                         skew          KL(p || a p + (1-a) q)  <= -ln a
    reverse       KL(q || p)                         skew-reverse  KL(q || (1-a) p + a q)  <= -ln a
    jsd           b KL(p || M) + (1-b) KL(q || M),   M = b p + (1-b) q

All are multiplied by T^2, since gradients would fade as 1/T^2; all are 0 if p = q, because no entropy is left out. JSD itself
goes to 0 at both ends of b, so, as in TRL, b = 0 means forward and b = 1 reverse. Skew is forward at a = 0.

Computation is in fp32, or in fp64 if the logits are. A logit of -inf rules its token out. A token that the teacher rules out
adds no term; reverse KL would be infinite there, so the student's softmax is taken over the tokens that the teacher allows.

Top-k is forward KL over k + 1 outcomes: the teacher's k likeliest tokens, and all others together. Renormalised top-k
would make the optimal q overconfident; here it has the teacher's own probabilities and its sum over the tail.

Papers: 2402.03898 (skew), 2306.13649 (JSD), 2503.16870 (why truncated tails mislead).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

Kind = Literal["forward", "reverse", "skew", "skew-reverse", "jsd"]

_CHUNK_BYTES = 64 << 20
"""Bytes of one fp32 array [tokens of a chunk, V]; a chunk needs a few of them at once."""
_USUAL_MIX = {"skew": 0.1, "skew-reverse": 0.1, "jsd": 0.5}


@dataclass(frozen=True)
class Divergence:
    """A kind of divergence and its parameters. Raises ValueError for parameters without meaning."""

    kind: Kind = "forward"
    temperature: float = 1.0
    mix: float | None = None
    """a of skew or b of JSD; None is the default, 0.1 or 0.5. Forward and reverse have none."""
    top_k: int = 0
    """The teacher's likeliest tokens that are compared one by one; 0 is all. Only with forward."""

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"a temperature is above 0, not {self.temperature}")
        # At a = 1 a skew is 0 whatever the student does.
        if self.mix is not None and not (0 <= self.mix < 1 or (self.mix == 1 and self.kind == "jsd")):
            raise ValueError(f"a mix is from 0 to 1, and below 1 for a skew, not {self.mix}")
        if self.top_k < 0 or (self.top_k and self.kind != "forward"):
            raise ValueError(f"top_k is a number of tokens and goes with forward only, not {self.top_k} with {self.kind}")

    @property
    def limit(self) -> tuple[Kind, float]:
        """(kind, mix), where a skew or JSD at an end of its mix becomes forward or reverse."""
        mix = _USUAL_MIX.get(self.kind, 0.0) if self.mix is None else self.mix
        ends: dict[tuple[Kind, float], Kind] = {
            ("skew", 0.0): "forward",
            ("skew-reverse", 0.0): "reverse",
            ("jsd", 0.0): "forward",
            ("jsd", 1.0): "reverse",
        }
        return ends.get((self.kind, mix), self.kind), mix


@dataclass(frozen=True)
class Top:
    """A teacher's k likeliest tokens and the sum of the rest, from its full softmax at one temperature."""

    ids: torch.Tensor
    """int64 [tokens, k], likeliest first."""
    log_probs: torch.Tensor
    """fp32 [tokens, k]."""
    log_tail: torch.Tensor
    """fp32 [tokens]: the log of the sum over all other tokens, -inf if there are none."""


def divergence(teacher: torch.Tensor, student: torch.Tensor, how: Divergence) -> torch.Tensor:
    """fp32 [tokens], nats times T^2, of logits [tokens, V]; no gradient to the teacher.

    Vocabularies padded to different widths are cut to the smaller one.
    """
    columns = min(teacher.shape[-1], student.shape[-1])
    teacher, student = teacher[..., :columns].detach(), student[..., :columns]
    if how.top_k:
        return against_top(top(teacher, how.top_k, how.temperature), student, how.temperature)
    kind, mix = how.limit
    if kind == "reverse":
        student = student.masked_fill(teacher.isneginf(), -math.inf)
    p, q = _log_softmax(teacher, how.temperature), _log_softmax(student, how.temperature)
    if kind == "forward":
        found = _kl(p, q)
    elif kind == "reverse":
        found = _kl(q, p)
    elif kind == "skew":
        found = _kl(p, _mixture(p, q, mix))
    elif kind == "skew-reverse":
        found = _kl(q, _mixture(q, p, mix))
    else:
        middle = _mixture(p, q, mix)
        found = mix * _kl(p, middle) + (1 - mix) * _kl(q, middle)
    return found * how.temperature**2


def top(teacher: torch.Tensor, k: int, temperature: float) -> Top:
    """The part of a teacher's logits [tokens, V] that top-k needs. A k above V counts as V."""
    p = _log_softmax(teacher.detach(), temperature)
    log_probs, ids = p.topk(min(k, p.shape[-1]), dim=-1)
    return Top(ids, log_probs, _log_rest(p, ids))


def against_top(kept: Top, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Forward KL times T^2, fp32 [tokens], to the result of `top` at the same temperature and over the same V columns."""
    q = _log_softmax(student, temperature)
    outcomes = torch.cat([q.gather(-1, kept.ids), _log_rest(q, kept.ids).unsqueeze(-1)], -1)
    return _kl(torch.cat([kept.log_probs, kept.log_tail.unsqueeze(-1)], -1), outcomes) * temperature**2


def loss_sum(
    teacher: torch.Tensor | None,
    student: torch.Tensor,
    labels: torch.Tensor,
    how: Divergence | None,
    kl_weight: float,
    ce_weight: float,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """fp32 scalar: kl_weight * divergence + ce_weight * cross entropy, summed over tokens.

    Logits [tokens, V]; labels int64 [tokens], all of which are scored. Cross entropy is at T = 1 over all of the student's
    columns. `chunk_tokens` at a time are in fp32, forward and backward; None stands for as many as a budget allows.
    The teacher (and `how`) may be None if kl_weight is 0. Raises ValueError if there is nothing to learn from.
    """
    if not (kl_weight or ce_weight):
        raise ValueError("kl_weight and ce_weight are both 0: there is nothing to learn")
    if kl_weight and (teacher is None or how is None):
        raise ValueError(f"kl_weight is {kl_weight}, but there is no teacher, or no divergence from it")
    if not student.shape[:-1] == labels.shape == (labels if teacher is None else teacher).shape[:1]:
        shapes = [None if x is None else tuple(x.shape) for x in (teacher, student, labels)]
        raise ValueError(f"teacher, student and labels are of the same tokens, not {', '.join(map(str, shapes))}")

    def part(teacher: torch.Tensor | None, student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = student.new_zeros((), dtype=_precision(student))
        if teacher is not None and how is not None:
            found = found + kl_weight * divergence(teacher, student, how).sum()
        if ce_weight:
            # Not nll_loss, which silently ignores a label of -100.
            found = found - ce_weight * _log_softmax(student, 1.0).gather(-1, labels.unsqueeze(-1)).sum()
        return found

    if teacher is not None:
        teacher = teacher.detach() if kl_weight else None
    if chunk_tokens is None:
        columns = max(student.shape[-1], 0 if teacher is None else teacher.shape[-1])
        chunk_tokens = max(1, _CHUNK_BYTES // (columns * _precision(student).itemsize))
    # `split`, not slices: the gradient of each slice would be as large as all logits.
    students = student.split(chunk_tokens)
    teachers = [None] * len(students) if teacher is None else teacher.split(chunk_tokens)
    again = student.requires_grad and torch.is_grad_enabled()
    total = student.new_zeros((), dtype=_precision(student))
    for chunk in zip(teachers, students, labels.split(chunk_tokens), strict=True):
        total = total + (checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) if again else part(*chunk))
    return total


def _precision(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    dtype = _precision(logits)
    if temperature == 1:
        return logits.log_softmax(-1, dtype=dtype)
    return (logits.to(dtype) / temperature).log_softmax(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) along the last dimension; p and q are logarithms. 0 log 0 is 0, and so are its gradients."""
    return (p.exp() * (p - q).masked_fill(p.isneginf(), 0.0)).sum(-1)


def _mixture(p: torch.Tensor, q: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight * p + (1 - weight) * q) of logarithms, 0 < weight < 1; 0 where both are -inf, which `_kl` ignores."""
    # The gradient of logaddexp is NaN where both are -inf.
    neither = p.isneginf() & q.isneginf()
    p, q = p.masked_fill(neither, 0.0), q.masked_fill(neither, 0.0)
    return torch.logaddexp(p + math.log(weight), q + math.log1p(-weight))


def _log_rest(p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log of the sum over all tokens but `ids`; more accurate than 1 - sum."""
    rest = p.scatter(-1, ids, -math.inf)
    # The gradient of logsumexp is NaN where all are -inf.
    none = rest.isneginf().all(-1)
    return rest.masked_fill(none.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(none, -math.inf)
