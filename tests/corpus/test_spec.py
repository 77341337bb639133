"""Spec: options are refused all at once, shares are fair, and the seed's order is the same everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.corpus import Corpus, shares
from compress.corpus.spec import shuffled
from compress.errors import UsageError
from corpus.oracle import said, slow_order, spec


def test_orders_and_digests_stay_what_they_were() -> None:
    """On every machine and with every version, or the seeds of published recipes lose their meaning."""
    assert list(shuffled(12, "0/x")) == [1, 8, 7, 3, 6, 0, 9, 2, 10, 5, 11, 4]
    assert (
        Corpus({"input_ids": torch.arange(6).reshape(2, 3), "mask": torch.ones(2, 3).bool()}).digest
        == "e8d3f2b14118aa62fa82ff4cb9deb89f116d29f9eaf49f163b8ab6b343daca00"
    )


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=9), st.integers(0, 10_000))
def test_shares_are_those_of_largest_remainders(weights: list[float], samples: int) -> None:
    counts = shares(samples, weights)
    quotas = [samples * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert sum(counts) == samples
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
    # Nobody who was rounded down had a larger remainder than one who was rounded up.
    up = [q % 1 for c, q in zip(counts, quotas, strict=True) if c > q]
    down = [q % 1 for c, q in zip(counts, quotas, strict=True) if c <= q]
    assert not up or not down or min(up) >= max(down)
    assert shares(samples, [weight * 2 for weight in weights if weight < 1e299] or [1]) == shares(
        samples, [w for w in weights if w < 1e299] or [1]
    )


@given(st.integers(0, 200), st.text(max_size=5), st.integers(0, 200))
def test_a_shuffle_is_a_permutation_and_its_start_needs_no_end(count: int, key: str, first: int) -> None:
    order = list(shuffled(count, key))
    assert order == slow_order(count, key)
    assert sorted(order) == list(range(count))
    assert [i for i, _ in zip(shuffled(count, key), range(first), strict=False)] == order[:first]


def test_documents_are_drawn_evenly() -> None:
    found = Counter(i for seed in range(4000) for i, _ in zip(shuffled(20, f"{seed}/x"), range(5), strict=False))
    assert min(found.values()) > 1000 - 5 * 28
    assert max(found.values()) < 1000 + 5 * 28  # 1000 expected, standard deviation 27.4


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ((), {}, ["data", "at least one source"]),
        (("a.csv",), {}, ["'a.csv', which ends in .csv", "rename or convert"]),
        (("a.parquet.gz",), {}, ["which ends in .gz"]),
        (("wikitext",), {}, ["'wikitext', which has no ending", "write hf:"]),
        (("hf:",), {}, ["hf:NAME:CONFIG"]),
        (("https://user:secret@host/a.txt2",), {}, ["a URL", "download"]),
        (("-", "-"), {}, ["'-' twice"]),
        (("a.txt", "b.safetensors"), {}, ["both"]),
        (("a.txt",), {"field": ""}, ["field"]),
        (("a.txt",), {"samples": 0}, ["samples", "at least 1", "0"]),
        (("a.txt",), {"length": 1}, ["length", "at least 2", "1"]),
        (("a.txt",), {"packing": "concat"}, ["packing", "one of concatenate, pad, documents", "'concat'"]),
        (("a.txt",), {"join": "bos"}, ["join", "one of auto, eos, none"]),
        (("a.txt",), {"bos": "yes"}, ["bos", "one of auto, always, never"]),
        (("a.txt",), {"weights": (1.0, 2.0)}, ["weights", "2 for 1 sources"]),
        (("a.txt", "b.txt"), {"weights": (1.0, -2.0)}, ["weights", "-2.0"]),
        (("a.txt", "b.txt"), {"weights": (1.0, 0.0)}, ["weights", "0.0", "leave it out of data"]),
        (("a.txt", "b.txt"), {"weights": (1.0, float("nan"))}, ["weights", "nan"]),
        (("a.txt", "b.txt"), {"weights": (1.0, float("inf"))}, ["weights", "inf"]),
        (("a.txt", "b.txt"), {"weights": (1.0, 1e-9)}, ["none of 6 from 'b.txt'"]),
        (("a.txt", "b.txt"), {"samples": 1}, ["none of 1 from 'b.txt'", "raise samples"]),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(data: tuple[str, ...], options: dict[str, Any], words: list[str]) -> None:
    text = said(lambda: spec(*data, **options), UsageError)
    assert all(word in text for word in words), text
    assert "secret" not in text


def test_all_that_is_wrong_with_options_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        spec("a.csv", samples=0, length=0, packing="x", weights=(1, 2))
    assert [problem.where for problem in caught.value.problems] == ["data", "packing", "samples", "length", "weights"]


def test_the_spec_needs_no_torch() -> None:
    code = "import sys, compress.corpus; assert not {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
