"""Oracle: what a corpus is, read and packed slowly; texts, talks, and how the tests ask for them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from compress.corpus import Corpus, CorpusSpec
from compress.errors import CompressError, InputError

EOS, BOS = 1, 0
TEMPLATE = "<s>{% for m in messages %}{{ m['role'] }}{% if m.tool is defined %} [{{ m.tool }}]{% endif %}: {{ m['content'] }}</s>\n{% endfor %}"
TEXTS = [f"Document {i} begins here. " + f"Line {i} of it, which says: {i * i}.\n" * (1 + i * 7 % 5) for i in range(60)]
TALKS = [
    [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} is a number. " * (1 + i % 4)}]
    for i in range(40)
]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path: Path, texts: list[str] = TEXTS) -> Path:
    return jsonl(path, [{"text": text, "other": 1} for text in texts])


def spec(*data: Path | str, **options: Any) -> CorpusSpec:
    return CorpusSpec(tuple(map(str, data)), **{"samples": 6, "length": 32, **options})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def slow_order(count: int, key: str) -> list[int]:
    order = list(range(count))
    for i in range(count):
        j = i + int(sha256(f"{key}/{i}".encode()), 16) % (count - i)
        order[i], order[j] = order[j], order[i]
    return order


def ids_of(folder: Path, texts: list[str], **options: Any) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, **{"add_special_tokens": False, **options})["input_ids"] for text in texts]


def slow_parts(texts: list[str], key: str, length: int) -> list[tuple[int, str]]:
    """A part of each document, four characters for a token, then another of those that have more, until none has."""
    size, parts = 4 * length, []
    for text in texts:
        starts = [0] + [at for at in range(1, len(text)) if text[at - 1].isspace()] + [len(text)]
        cuts = [starts[bisect_left(starts, min(k * size, len(text)))] for k in range(max(1, -(-len(text) // size)) + 1)]
        parts.append([text[a:b] for a, b in pairwise(cuts)])
    orders = [slow_order(len(some), f"{key}/{i}") for i, some in enumerate(parts)]
    turns = range(max(map(len, parts)))
    return [(i, parts[i][orders[i][turn]]) for turn in turns for i in slow_order(len(texts), key) if turn < len(parts[i])]


def slow_windows(
    folder: Path, texts: list[str], key: str, count: int, length: int, prefix: list[int], joint: list[int]
) -> list[list[int]]:
    """All documents encoded one by one in the order of `key`, joined, and cut."""
    stream: list[int] = []
    for ids in ids_of(folder, [part for _, part in slow_parts(texts, key, length)]):
        stream += (joint if stream else []) + ids
    size = length - len(prefix)
    return [prefix + stream[at : at + size] for at in range(0, len(stream) - size, size)][:count]


def slow_documents(
    encoded: list[list[int]], count: int, length: int, prefix: list[int], joint: list[int]
) -> list[list[tuple[int, int]]]:
    """Ids and positions of documents packed token by token; in a new window a document begins again, prefix and all."""
    packed: list[list[tuple[int, int]]] = [[]]
    for ids in encoded:
        left, lead, position = ids + joint, [*prefix], 0
        while left:
            if len(packed[-1]) == length:
                packed.append([])
                lead, position = [*prefix], 0
            packed[-1].append((lead.pop(0) if lead else left.pop(0), position))
            position += 1
    return packed[:count]


def packed_rows(corpus: Corpus, seed: int = 0) -> list[list[tuple[int, int]]]:
    """Ids and positions of the samples, in the order of their sources."""
    pairs = zip(rows(corpus, seed), rows(corpus, seed, "position_ids"), strict=True)
    return [list(zip(ids, positions, strict=True)) for ids, positions in pairs]


def rows(corpus: Corpus, seed: int = 0, name: str = "input_ids") -> list[list[int]]:
    """The samples in the order of their sources, the last shuffle undone."""
    ids = corpus.tensors[name]
    order = slow_order(len(ids), f"{seed}/order")
    return [ids[order.index(i)].tolist() for i in range(len(ids))]


def said(run: Callable[[], Any], kind: type[CompressError] = InputError) -> str:
    """What a failure says; each has its four parts."""
    with pytest.raises(kind) as caught:
        run()
    for problem in caught.value.problems:
        assert all((problem.where, problem.expected, problem.got, problem.do)), problem
    return str(caught.value)
