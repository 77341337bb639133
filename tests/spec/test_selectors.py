"""Targets: class words, regexes and names; a selector that matches nothing is an error."""

import pytest

from compress.errors import UsageError
from compress.spec.selectors import select
from compress.spec.weight_state import Weight

WEIGHTS = [
    Weight("embed.weight", "BF16", (8, 4), "embedding"),
    Weight("h.0.self_attn.q.weight", "BF16", (4, 4), "linear", stack="decoder", block=0),
    Weight("h.0.mlp.up.weight", "BF16", (4, 4), "linear", stack="decoder", block=0),
    Weight("h.0.mlp.experts.0.w1.weight", "BF16", (4, 4), "expert", stack="decoder", block=0),
    Weight("h.0.gate.weight", "BF16", (4, 4), "router", stack="decoder", block=0),
    Weight("vision.0.q.weight", "BF16", (4, 4), "linear", stack="tower:vision", block=0),
    Weight("pooler.weight", "BF16", (4, 4), "linear"),
    Weight("lm_head.weight", "BF16", (8, 4), "head"),
]


@pytest.mark.parametrize(
    ("targets", "skip", "found"),
    [
        (["linear"], [], [1, 2, 3]),
        (["attention"], [], [1]),
        (["mlp"], [], [2]),
        (["experts"], [], [3]),
        (["linear"], ["experts"], [1, 2]),
        (["linear", "head"], [], [1, 2, 3, 7]),
        (["re:vision"], [], [5]),
        (["pooler"], [], [6]),
        (["lm_head.weight", "embeddings"], [], [0, 7]),
    ],
)
def test_selection(targets: list[str], skip: list[str], found: list[int]) -> None:
    assert select(WEIGHTS, targets, skip) == [WEIGHTS[i] for i in found]


@pytest.mark.parametrize(
    ("targets", "said"), [(["lineer"], "did you mean 'linear'"), (["re:("], "regular expression"), (["re:nothing"], "no match")]
)
def test_wrong_selectors(targets: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        select(WEIGHTS, targets)
