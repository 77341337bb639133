"""Corpus: each kind of source gives what a slow reading gives, the seed fixes it, and each failure says what to do."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from compress.corpus import Corpus, CorpusSpec, build, documents, encoder, shares
from compress.corpus.encoder import Encoder
from compress.corpus.spec import shuffled
from compress.errors import CompressError, InputError, MachineError, UsageError

EOS, BOS = 1, 0
TEMPLATE = "<s>{% for m in messages %}{{ m['role'] }}{% if m.tool is defined %} [{{ m.tool }}]{% endif %}: {{ m['content'] }}</s>\n{% endfor %}"
TEXTS = [f"Document {i} begins here. " + f"Line {i} of it, which says: {i * i}.\n" * (1 + i * 7 % 5) for i in range(60)]
TALKS = [
    [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} is a number. " * (1 + i % 4)}]
    for i in range(40)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of datasets, and a working directory with nothing in it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def tokenizers(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo tokenizer as it is, and variants: adding BOS, or BOS and EOS, ending with EOS, with a chat template, without EOS."""
    found = {"plain": demo_model}

    def variant(name: str, config: dict[str, Any], post: list[str] | None = None, added: Sequence[Any] = ()) -> None:
        folder = found[name] = tmp_path_factory.mktemp(name)
        content = json.loads((demo_model / "tokenizer.json").read_text())
        content["added_tokens"] += added
        if post:
            ids = {"<s>": BOS, "</s>": EOS}
            single = [
                {"SpecialToken": {"id": t, "type_id": 0}} if t in ids else {"Sequence": {"id": "A", "type_id": 0}} for t in post
            ]
            pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
            special = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in ids.items()}
            content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        settings = json.loads((demo_model / "tokenizer_config.json").read_text()) | config
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    variant("bos", {}, ["<s>", "A"])
    variant("both", {}, ["<s>", "A", "</s>"])
    variant("two", {}, ["<s>", "</s>", "A"])
    variant("chat", {"chat_template": TEMPLATE})
    variant("bare", {"bos_token": None, "eos_token": None})
    added = {
        "id": 1024,
        "content": "<pad>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    variant("pad", {"pad_token": "<pad>"}, None, [added])
    parts = "{% for p in messages[0].content %}{% if 'image' in p %}IMAGE{% endif %}{{ p.text }}{% endfor %}"
    variant("parts", {"chat_template": parts})
    variant("picky", {"chat_template": "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"})
    return found


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


def write_kind(kind: str, folder: Path) -> tuple[str, str, list[str]]:
    """A source of that kind with TEXTS, the key of its draws, and its documents."""
    content = lines(folder / "made.jsonl").read_bytes()
    name = folder / f"texts.{kind}"
    if kind in ("jsonl", "json", "ndjson"):
        name.write_bytes(content)
    elif kind == "jsonl.gz":
        name.write_bytes(gzip.compress(content))
    elif kind in ("txt", "txt.gz"):
        content = "".join(TEXTS).encode()
        name.write_bytes(content if kind == "txt" else gzip.compress(content))
        return str(name), sha256(content), ["".join(TEXTS)]
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(60), "text": TEXTS}), name, row_group_size=7)
        return str(name), sha256(name.read_bytes()), TEXTS
    elif kind == "dataset":
        shutil.copytree(folder, folder / "set", ignore=lambda *_: [])
        return f"hf:{folder / 'set'}", "hf:set train", TEXTS
    return str(name), sha256(content), TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "json", "ndjson", "jsonl.gz", "txt", "txt.gz", "parquet", "dataset"])
def test_each_kind_of_source_gives_what_a_slow_reading_gives(kind: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source, key, texts = write_kind(kind, folder)
    corpus = build(spec(source, samples=9), tokenizers["plain"], 3)
    assert rows(corpus, 3) == slow_windows(tokenizers["plain"], texts, f"3/{key}", 9, 32, [], [EOS])
    assert corpus.tensors["attention_mask"].all()
    assert {name: (t.dtype, t.shape) for name, t in corpus.tensors.items()} == {
        "input_ids": (torch.int64, (9, 32)), "attention_mask": (torch.bool, (9, 32)),
    }  # fmt: skip
    (record,) = corpus.sources
    assert (record.samples, record.total) == (9, len(texts))
    assert (record.revision, record.fingerprint) == (None, None)
    parts = slow_parts(texts, f"3/{key}", 32)
    lengths = [len(ids) + 1 for ids in ids_of(tokenizers["plain"], [part for _, part in parts])]
    assert record.documents == len({i for at, (i, _) in enumerate(parts) if sum(lengths[:at]) - 1 < 9 * 32})
    assert record.name == ("hf:set" if kind == "dataset" else f"texts.{kind}")
    assert record.sha256 == (None if kind == "dataset" else key)
    if len(texts) > 1:
        padded = build(spec(source, samples=9, packing="pad"), tokenizers["plain"], 3)
        expected = [ids[:32] for ids in ids_of(tokenizers["plain"], [texts[i] for i in slow_order(60, f"3/{key}")[:9]])]
        assert [row[: len(ids)] for row, ids in zip(rows(padded, 3), expected, strict=True)] == expected
        assert padded.tensors["attention_mask"].sum() == sum(map(len, expected))
        assert padded.sources[0].documents == 9


@pytest.mark.parametrize("form", ["records", "text"])
def test_stdin_is_records_or_a_text(
    form: str, tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a.jsonl" if form == "records" else "a.txt"
    content = lines(tmp_path / "a.jsonl").read_bytes() if form == "records" else "".join(TEXTS).encode()
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    piped = build(spec("-"), tokenizers["plain"], 1)
    assert piped.digest == build(spec(tmp_path / name), tokenizers["plain"], 1).digest
    assert (piped.sources[0].name, piped.sources[0].sha256) == ("-", sha256(content))


def test_the_seed_fixes_the_corpus(demo_model: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    first = build(spec(source), demo_model, 0)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(source, tmp_path / "elsewhere" / "b.jsonl")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    for again in (source, moved, tmp_path / "c.jsonl.gz"):
        assert build(spec(again), demo_model, 0).digest == first.digest
    digests = {build(spec(source), demo_model, seed).digest for seed in range(5)}
    assert len(digests) == 5


def test_orders_and_digests_stay_what_they_were() -> None:
    """On every machine and with every version, or the seeds of published recipes lose their meaning."""
    assert list(shuffled(12, "0/x")) == [1, 8, 7, 3, 6, 0, 9, 2, 10, 5, 11, 4]
    assert (
        Corpus({"input_ids": torch.arange(6).reshape(2, 3), "mask": torch.ones(2, 3).bool()}).digest
        == "e8d3f2b14118aa62fa82ff4cb9deb89f116d29f9eaf49f163b8ab6b343daca00"
    )


def test_a_source_beside_another_is_drawn_as_it_is_alone(demo_model: Path, tmp_path: Path) -> None:
    one, other = lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl", [t.upper() for t in TEXTS])
    alone = rows(build(spec(one, samples=8), demo_model, 0))
    for data in ((one, other), (other, one)):
        both = build(spec(*data, samples=16), demo_model, 0)
        mine = rows(both)[:8] if data[0] == one else rows(both)[8:]
        assert mine == alone
        assert [s.samples for s in both.sources] == [8, 8]
    # More samples go on where fewer stopped.
    assert rows(build(spec(one, samples=12), demo_model, 0))[:8] == alone
    ids = both.tensors["input_ids"].tolist()
    places = [i for i, row in enumerate(ids) if row in alone]
    assert places not in (list(range(8)), list(range(8, 16)))


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [
        ((), 9, [3, 3, 3]),
        ((), 8, [3, 3, 2]),
        ((1, 1, 2), 8, [2, 2, 4]),
        ((0.5, 0.3, 0.2), 7, [4, 2, 1]),
        ((5e-324, 5e-324, 5e-324), 3, [1, 1, 1]),
    ],
)
def test_weights_are_kept(
    weights: tuple[float, ...], samples: int, expected: list[int], demo_model: Path, tmp_path: Path
) -> None:
    data = [lines(tmp_path / f"{name}.jsonl", [name * 3 + t for t in TEXTS]) for name in "xyz"]
    corpus = build(spec(*data, weights=weights, samples=samples, packing="pad"), demo_model, 0)
    assert [source.samples for source in corpus.sources] == expected
    heads = Counter(AutoTokenizer.from_pretrained(demo_model).decode(row)[0] for row in corpus.tensors["input_ids"])
    assert [heads[name] for name in "xyz"] == expected


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
    ("tokenizer", "options", "prefix", "joint"),
    [
        ("plain", {}, [], [EOS]), ("plain", {"join": "none"}, [], []), ("plain", {"bos": "always"}, [BOS], [EOS]),
        ("bos", {}, [BOS], [EOS]), ("bos", {"bos": "never", "join": "eos"}, [], [EOS]), ("both", {}, [BOS], [EOS]),
        ("bare", {}, [], []), ("bos", {"join": "none"}, [BOS], []),
    ],
)  # fmt: skip
def test_a_stream_is_documents_one_by_one(
    tokenizer: str, options: dict[str, Any], prefix: list[int], joint: list[int], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source = lines(tmp_path / "a.jsonl")
    corpus = build(spec(source, samples=20, **options), tokenizers[tokenizer], 0)
    key = f"0/{sha256(source.read_bytes())}"
    assert rows(corpus) == slow_windows(tokenizers["plain"], TEXTS, key, 20, 32, prefix, joint)


def test_a_window_that_begins_with_bos_gets_no_second(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["<s>" + text + "</s>" for text in TEXTS])
    for packing in ("concatenate", "pad"):
        first = rows(build(spec(source, samples=20, packing=packing), tokenizers["bos"], 0))
        assert all(row[0] == BOS for row in first)
        assert not any(row[:2] == [BOS, BOS] for row in first)
        if packing == "concatenate":
            assert not any(pair == (EOS, EOS) for row in first for pair in pairwise(row))


@pytest.mark.parametrize(
    ("tokenizer", "options", "prefix", "joint"),
    [
        ("plain", {}, [], [EOS]), ("plain", {"join": "none"}, [], []), ("plain", {"bos": "always"}, [BOS], [EOS]),
        ("bos", {}, [BOS], [EOS]), ("bos", {"bos": "never", "join": "eos"}, [], [EOS]), ("both", {}, [BOS], [EOS]),
        ("bare", {}, [], []), ("bos", {"join": "none"}, [BOS], []), ("two", {"join": "none"}, [BOS, EOS], []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [5, 32, 500])
def test_packed_documents_begin_at_position_0(
    tokenizer: str, options: dict[str, Any], prefix: list[int], joint: list[int], length: int,
    tokenizers: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    """Short windows end at every place of a document, within its prefix too; long ones hold many documents."""
    source = lines(tmp_path / "a.jsonl")
    key, count = f"0/{sha256(source.read_bytes())}", {5: 200, 32: 20, 500: 3}[length]
    corpus = build(spec(source, samples=count, length=length, packing="documents", **options), tokenizers[tokenizer], 0)
    encoded = ids_of(tokenizers["plain"], [part for _, part in slow_parts(TEXTS, key, length) if part.strip()])
    assert packed_rows(corpus) == slow_documents(encoded, count, length, prefix, joint)
    assert {name: (t.dtype, t.shape) for name, t in corpus.tensors.items()} == {
        "input_ids": (torch.int64, (count, length)), "attention_mask": (torch.bool, (count, length)),
        "position_ids": (torch.int64, (count, length)),
    }  # fmt: skip
    assert corpus.tensors["attention_mask"].all()
    assert length > 5 or {row[-1][1] for row in packed_rows(corpus)} >= {0, 4}


def test_packed_documents_are_the_stream_cut_alike(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Only `position_ids` come new, and only there."""
    source = lines(tmp_path / "a.jsonl")
    stream, packed, padded = (
        build(spec(source, packing=packing), tokenizers["plain"], 0) for packing in ("concatenate", "documents", "pad")
    )
    assert packed.sources == stream.sources
    assert set(stream.tensors) == set(padded.tensors) == {"input_ids", "attention_mask"}
    assert set(packed.tensors) == {"input_ids", "attention_mask", "position_ids"}
    assert all(torch.equal(tensor, packed.tensors[name]) for name, tensor in stream.tensors.items())
    assert packed.digest != stream.digest
    # More samples go on where fewer stopped, and another source does not disturb.
    other = lines(tmp_path / "b.jsonl", [text.upper() for text in TEXTS])
    more = build(spec(source, other, samples=24, packing="documents"), tokenizers["plain"], 0)
    assert packed_rows(more)[:6] == packed_rows(packed)


def test_a_packed_document_that_begins_with_bos_gets_no_second(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    # In samples of 64 tokens no text is longer than a part.
    source = lines(tmp_path / "a.jsonl", ["<s>" + text + "</s>" for text in TEXTS])
    order = slow_order(60, f"0/{sha256(source.read_bytes())}")
    encoded = ids_of(tokenizers["plain"], [TEXTS[i] for i in order])
    for options, prefix in (({}, [BOS]), ({"bos": "always"}, [BOS]), ({"bos": "never"}, [])):
        corpus = build(spec(source, samples=20, length=64, packing="documents", **options), tokenizers["bos"], 0)
        assert packed_rows(corpus) == slow_documents(encoded, 20, 64, prefix, [EOS])


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize(("bos", "prefix"), [("auto", [BOS]), ("always", [BOS]), ("never", [])])
def test_packed_conversations_begin_and_end_as_their_template_has_it(
    times: int, bos: str, prefix: list[int], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """Long ones, of which no parts are taken, go on over several windows."""
    talks = [[{**message, "content": message["content"] * times} for message in talk] for talk in TALKS]
    source = jsonl(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["chat"])
    order = slow_order(40, f"0/{sha256(source.read_bytes())}")
    encoded = [tokenizer.apply_chat_template(talks[i], return_dict=False)[1:] for i in order]
    options = {"field": "messages", "chat": True, "packing": "documents", "bos": bos}
    corpus = build(spec(source, samples=20, **options), tokenizers["chat"], 0)
    expected = slow_documents(encoded, 20, 32, prefix, [])
    assert packed_rows(corpus) == expected
    assert (sum(row[-1][1] == 31 for row in expected) > 15) == (times == 40)


def test_a_packed_corpus_of_one_document(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Its parts are drawn in an order of their own, so each is a text by itself; one that fits in a sample fills it alone."""
    text = "".join(f"The line {i} of the only document.\n" for i in range(200))
    source = lines(tmp_path / "a.jsonl", [text])
    key = f"0/{sha256(source.read_bytes())}"
    corpus = build(spec(source, samples=20, packing="documents"), tokenizers["bos"], 0)
    encoded = ids_of(tokenizers["plain"], [part for _, part in slow_parts([text], key, 32)])
    assert packed_rows(corpus) == slow_documents(encoded, 20, 32, [BOS], [EOS])
    assert (corpus.sources[0].documents, corpus.sources[0].total) == (1, 1)
    whole = [BOS, *ids_of(tokenizers["plain"], [TEXTS[3]])[0]]
    alone = spec(lines(tmp_path / "b.jsonl", [TEXTS[3]]), samples=1, length=len(whole), packing="documents")
    assert packed_rows(build(alone, tokenizers["bos"], 0)) == [list(zip(whole, range(len(whole)), strict=True))]


def test_a_packed_corpus_is_fixed_by_its_seed_and_comes_back_from_its_file(demo_model: Path, tmp_path: Path) -> None:
    options = spec(lines(tmp_path / "a.jsonl"), packing="documents")
    corpus = build(options, demo_model, 0)
    assert build(options, demo_model, 0).digest == corpus.digest
    assert len({build(options, demo_model, seed).digest for seed in range(5)}) == 5
    corpus.save(tmp_path / "corpus.safetensors")
    loaded = Corpus.load(tmp_path / "corpus.safetensors")
    assert (loaded.digest, loaded.sources, loaded.samples) == (corpus.digest, corpus.sources, 6)
    assert torch.equal(loaded.tensors["position_ids"], corpus.tensors["position_ids"])
    moved = {**corpus.tensors, "position_ids": corpus.tensors["position_ids"] + 1}
    assert Corpus(moved).digest != corpus.digest
    # As a ready source it gives what it has.
    ready = build(spec(tmp_path / "corpus.safetensors"), tmp_path, 0)
    assert set(ready.tensors) == set(corpus.tensors)


@pytest.mark.parametrize(
    ("tokenizer", "options"), [("plain", {}), ("bos", {}), ("both", {}), ("bos", {"bos": "never"}), ("both", {"bos": "always"})]
)
def test_padding_is_masked(tokenizer: str, options: dict[str, Any], tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """As the tokenizer itself truncates and pads, where `bos` leaves it to it."""
    texts = [*TEXTS[:20], "x", "  \n ", ""]
    source = lines(tmp_path / "a.jsonl", texts)
    corpus = build(spec(source, samples=21, packing="pad", **options), tokenizers[tokenizer], 0)
    own = {} if options else {"add_special_tokens": True}
    length = 31 if options.get("bos") == "always" else 32
    encoded = ids_of(tokenizers[tokenizer], texts, truncation=True, max_length=length, **own)
    order = [i for i in slow_order(len(texts), f"0/{sha256(source.read_bytes())}") if texts[i].strip()]
    lead = [BOS] if options.get("bos") == "always" else []
    expected = [lead + encoded[i] for i in order]
    assert rows(corpus) == [ids + [EOS] * (32 - len(ids)) for ids in expected]
    mask = corpus.tensors["attention_mask"][[slow_order(21, "0/order").index(i) for i in range(21)]]
    assert mask.tolist() == [[i < len(ids) for i in range(32)] for ids in expected]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("packing", ["pad", "concatenate"])
def test_conversations_go_through_the_chat_template(form: str, packing: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    folder.mkdir()
    source = jsonl(folder / "talks.jsonl", [{"messages": talk} for talk in TALKS])
    key, name, talks = sha256(source.read_bytes()), str(source), TALKS
    if form == "parquet":
        # What one message has and others lack comes back as nulls.
        odd = talks = [[talk[0], {**talk[1], "tool": "x"}] for talk in TALKS]
        pyarrow.parquet.write_table(pyarrow.table({"messages": odd}), folder / "talks.parquet")
        key, name = sha256((folder / "talks.parquet").read_bytes()), str(folder / "talks.parquet")
    elif form == "dataset":
        key, name = "hf:talks train", f"hf:{folder}"
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["chat"])
    encoded = [tokenizer.apply_chat_template(talks[i], return_dict=False) for i in slow_order(40, f"5/{key}")]
    assert encoded[0][0] == BOS
    corpus = build(spec(name, field="messages", chat=True, packing=packing), tokenizers["chat"], 5)
    if packing == "pad":
        assert [row[: len(ids)] for row, ids in zip(rows(corpus, 5), encoded, strict=False)] == [ids[:32] for ids in encoded[:6]]
        return
    stream, at = [i for ids in encoded for i in ids], 0
    for row in rows(corpus, 5):
        lead = [] if stream[at] == BOS else [BOS]
        assert row == lead + stream[at : at + 32 - len(lead)]
        at += 32 - len(lead)
    never = rows(build(spec(name, field="messages", chat=True, packing=packing, bos="never"), tokenizers["chat"], 5), 5)
    assert [i for row in never for i in row][: len(encoded[0]) - 1] == encoded[0][1:]


def test_parts_of_a_message_have_no_nulls(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Parquet fills what one part has and others lack with nulls; a template would take them for images."""
    parts = [{"type": "text", "text": "Look: "}, {"type": "text", "text": "there.", "image": "x"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[{"role": "user", "content": parts}]]}), tmp_path / "a.parquet")
    corpus = build(spec(tmp_path / "a.parquet", field="messages", chat=True, samples=1, packing="pad"), tokenizers["parts"], 0)
    ids = corpus.tensors["input_ids"][corpus.tensors["attention_mask"]]
    assert AutoTokenizer.from_pretrained(tokenizers["parts"]).decode(ids) == "Look: IMAGEthere."


def test_a_long_text_is_cut_at_ends_of_lines(demo_model: Path, tmp_path: Path) -> None:
    text = "".join(f"{i} ümläute und mehr\n" for i in range(20_000))
    text += "ü" * 200_000 + "\nend"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with open(tmp_path / "a.txt", "rb") as stream:
        pieces = documents._Pieces("a.txt", stream)
        found = [piece for _, piece in pieces.read(range(pieces.count))]
    assert "".join(found) == text
    assert len(found) > 8
    assert all(len(piece.encode()) < 3 << 16 for piece in found)
    assert sum(piece.endswith("\n") for piece in found) >= len(found) - 4
    assert build(spec(tmp_path / "a.txt"), demo_model, 0).sources[0].total == len(found)


def test_of_a_long_document_no_more_is_encoded_than_needed(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"The line {i} of a long document.\n" for i in range(30_000))
    source = lines(tmp_path / "a.jsonl", [text, "."])
    seen: list[int] = []
    original = Encoder._ids
    monkeypatch.setattr(Encoder, "_ids", lambda self, texts: seen.extend(map(len, texts)) or original(self, texts))
    corpora = [build(spec(source, samples=n, packing=p), demo_model, 0) for n, p in ((6, "concatenate"), (2, "pad"))]
    assert sum(seen) < len(text) / 100
    whole = ids_of(demo_model, [text])[0]
    key = f"0/{sha256(source.read_bytes())}"
    assert rows(corpora[0]) == slow_windows(demo_model, [text, "."], key, 6, 32, [], [EOS])
    assert whole[:32] in corpora[1].tensors["input_ids"].tolist()


def test_a_text_of_long_tokens_is_encoded_whole(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_SPAN", 1)
    source = lines(tmp_path / "a.jsonl", [text * 4 for text in TEXTS])
    key = sha256(source.read_bytes())
    texts = [TEXTS[i] * 4 for i in slow_order(60, f"0/{key}")]
    assert rows(build(spec(source, packing="pad"), demo_model, 0)) == [ids[:32] for ids in ids_of(demo_model, texts[:6])]
    windows = slow_windows(demo_model, [text * 4 for text in TEXTS], f"0/{key}", 40, 32, [], [EOS])
    assert rows(build(spec(source, samples=40), demo_model, 0)) == windows


def test_a_large_file_is_not_held_in_memory(demo_model: Path, tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "w") as stream:
        for i in range(20_000):
            stream.write(json.dumps({"text": f"Line {i}. " + "word " * 200, "meta": list(range(20))}) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > 20 << 20
    build(spec(tmp_path / "a.jsonl"), demo_model, 1)
    tracemalloc.start()
    try:
        build(spec(tmp_path / "a.jsonl"), demo_model, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_corpus_is_saved_and_loaded(demo_model: Path, tmp_path: Path) -> None:
    corpus = build(spec(lines(tmp_path / "a.jsonl"), packing="pad"), demo_model, 0)
    corpus.save(tmp_path / "corpus.safetensors")
    corpus.save(tmp_path / "again.safetensors")
    assert (tmp_path / "corpus.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    loaded = Corpus.load(tmp_path / "corpus.safetensors")
    assert (loaded.digest, loaded.sources, loaded.samples) == (corpus.digest, corpus.sources, 6)
    assert {name: t.dtype for name, t in loaded.tensors.items()} == {name: t.dtype for name, t in corpus.tensors.items()}
    assert str(tmp_path) not in repr(corpus.sources)


def test_a_digest_tells_names_shapes_dtypes_and_bytes_apart() -> None:
    ids = torch.arange(6)
    variants = [
        {"a": ids},
        {"b": ids},
        {"a": ids.reshape(2, 3)},
        {"a": ids.reshape(3, 2)},
        {"a": ids.int()},
        {"a": ids + 1},
        {"a": ids, "b": ids},
    ]
    assert len({Corpus(tensors).digest for tensors in variants}) == len(variants)
    assert Corpus({"b": ids, "a": ids}).digest == Corpus({"a": ids, "b": ids}).digest
    assert Corpus({"a": ids.reshape(2, 3).T}).digest == Corpus({"a": ids.reshape(2, 3).T.contiguous()}).digest


def test_a_saved_corpus_is_checked(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    corpus = build(spec(lines(tmp_path / "a.jsonl")), demo_model, 0)
    corpus.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "altered" in said(lambda: Corpus.load(path))
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match="truncated"):
        Corpus.load(path)
    save_file(dict(corpus.tensors), path)
    assert "no such record" in said(lambda: Corpus.load(path))
    Corpus({"a": torch.zeros(3), "b": torch.zeros(4)}).save(path)
    assert "a [3], b [4]" in said(lambda: Corpus.load(path))
    for value in (float("nan"), float("inf")):
        Corpus({"a": torch.tensor([0.0, value])}).save(path)
        assert "NaN or Inf" in said(lambda: Corpus.load(path))
    assert "no such file" in said(lambda: Corpus.load(tmp_path / "none.safetensors"))
    assert "a place" in said(lambda: corpus.save(tmp_path / "none" / "c.safetensors"), MachineError)


def features(path: Path, count: int = 12, start: int = 0, **more: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(start)
    tensors = {
        "input_features": torch.randn(count, 4, 10, generator=generator).bfloat16(),
        "decoder_input_ids": torch.arange(start, start + count * 3, dtype=torch.int32).reshape(count, 3) % 100,
        "weight": torch.rand(count, generator=generator),
    }
    save_file(tensors | more, path)
    return path


def test_ready_inputs_are_taken_as_they_are(demo_model: Path, tmp_path: Path) -> None:
    one, other = features(tmp_path / "a.safetensors"), features(tmp_path / "b.safetensors", 9, 50)
    whole = [load_file(one), load_file(other)]
    # No tokenizer is needed, and `length` is not theirs.
    corpus = build(spec(one, other, samples=10, weights=(3, 2), length=2048), tmp_path / "none", 7, vocabulary=100, positions=3)
    orders = [slow_order(n, f"7/{sha256(p.read_bytes())}") for n, p in ((12, one), (9, other))]
    last = slow_order(10, "7/order")
    for name, tensor in corpus.tensors.items():
        drawn = torch.cat([whole[0][name][orders[0][:6]], whole[1][name][orders[1][:4]]])
        assert tensor.dtype == whole[0][name].dtype
        assert torch.equal(tensor, drawn[last])
    assert [(s.name, s.samples, s.documents, s.total) for s in corpus.sources] == [
        ("a.safetensors", 6, 6, 12),
        ("b.safetensors", 4, 4, 9),
    ]
    assert corpus.sources[0].sha256 == sha256(one.read_bytes())
    assert build(spec(one, other, samples=10, weights=(3, 2)), tmp_path, 7).digest == corpus.digest
    assert build(spec(one, other, samples=10, weights=(3, 2)), tmp_path, 8).digest != corpus.digest


def test_ready_inputs_are_checked(tmp_path: Path) -> None:
    path, other = features(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"

    def tried(*data: Path, **limits: int) -> str:
        return said(lambda: build(spec(*data), tmp_path, 0, **limits))

    assert "expected: 6 samples" in tried(features(other, 5))
    assert "it has 5" in tried(features(other, 5))
    assert "equally many" in tried(features(other, weight=torch.zeros(5)))
    assert "equally many" in tried(features(other, weight=torch.zeros(())))
    assert "'weight' of shape [12, 0]" in tried(features(other, weight=torch.zeros(12, 0)))
    assert "NaN or Inf" in tried(features(other, weight=torch.full((12,), torch.nan)))
    assert "NaN or Inf" in tried(features(other, weight=torch.full((12,), torch.nan).to(torch.float8_e4m3fn)))
    assert "the inputs of" in tried(path, features(other, more=torch.zeros(12)))
    assert "the inputs of" in tried(path, features(other, weight=torch.zeros(12).double()))
    shutil.copy(path, other)
    assert f"those of {path}" in tried(path, other)
    assert "ids from 0 to 9" in tried(path, vocabulary=10)
    most = int(load_file(other)["decoder_input_ids"].max())
    assert build(spec(path, samples=12), tmp_path, 0, vocabulary=most + 1)
    assert str(most) in said(lambda: build(spec(path, samples=12), tmp_path, 0, vocabulary=most))
    assert "at most 2 tokens" in tried(path, positions=2)
    assert "-100" in tried(features(other, input_ids=torch.full((12, 2), -100)))
    save_file({}, other)
    assert "no tensor" in tried(other)
    other.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="header"):
        build(spec(other), tmp_path, 0)


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


BAD_FILES: list[tuple[str, bytes, dict[str, Any], list[str]]] = [
    ("a.jsonl", b"", {}, ["at least one document", "none"]),
    ("a.jsonl", b"\n  \n", {}, ["at least one document"]),
    ("a.txt", b"", {}, ["at least one document"]),
    ("a.jsonl", b'\n\n{"text": "a" "b"}\n', {}, ["a.jsonl:3\n", "Expecting ',' delimiter, column 14"]),
    ("a.jsonl", b"\n[1, 2]\n", {}, ["a.jsonl:2\n", "an array", "jq"]),
    ("a.json", b' [{"text": "a"}]', {}, ["an array", "jq"]),
    ("a.jsonl", b"12\n", {}, ["a JSON object", "a number"]),
    ("a.jsonl", b"[" * 100_000, {}, ["an array"]),
    ("a.jsonl", b'{"a":' * 100_000, {}, ["a.jsonl:1\n"]),
    ("a.jsonl", b'{"txt": "a", "meta": 1}\n', {}, ["a.jsonl:1\n", "a field 'text'", "only meta, txt (did you mean 'txt'?)", "set field"]),
    ("a.jsonl", b"{}\n", {}, ["no field at all"]),
    ("a.jsonl", b'{"text": 5}\n', {}, ["a.jsonl:1\n", "'text': a text", "a number"]),
    ("a.jsonl", b'{"text": null}\n', {}, ["null"]),
    ("a.jsonl", b'{"text": ["a"]}\n', {}, ["a list", "chat=true"]),
    ("a.jsonl", b'{"text": "a\xe9"}\n', {}, ["a.jsonl:1\n", "UTF-8", "the byte 0xe9 at 12", "iconv"]),
    ("a.jsonl", b'{"text": "a\\ud800"}\n', {}, ["half of a surrogate pair"]),
    ("a.txt", b"caf\xe9\n", {}, ["a.txt: after byte 0\n", "UTF-8", "0xe9"]),
    ("a.txt.gz", b"no gzip", {}, ["a gzip file"]),
    ("a.txt.gz", gzip.compress(b"some text " * 99)[:-12], {}, ["a gzip file", "fetch or pack it again"]),
    ("a.txt", b"Some text.", {"chat": True}, ["records with conversations", "chat=false"]),
    ("a.txt", b"Too few.", {}, ["192 tokens for 6 samples of 32", "tokens in 1 documents", "these make 0 samples"]),
    ("a.txt", b"Too few.", {"packing": "documents"}, ["192 tokens for 6 samples of 32", "tokens in 1 documents", "these make 0 samples"]),
    ("a.txt", b"One document. " * 99, {"packing": "pad"}, ["6 documents with text", "1 among 1", "concatenate"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": " "}\n' * 5, {"packing": "pad"}, ["5 among 10"]),
    ("a.parquet", b"PAR1 this is none", {}, ["a sound parquet file"]),
    ("a.jsonl", b'{"messages": "hi"}\n', {"chat": True, "field": "messages"}, ["a list of {role, content}", "a text"]),
    ("a.jsonl", b'{"messages": []}\n', {"chat": True, "field": "messages"}, ["an empty list"]),
    ("a.jsonl", b'{"messages": ["hi"]}\n', {"chat": True, "field": "messages"}, ["a text"]),
    ("a.jsonl", b'{"messages": [{"from": "human", "value": "hi"}]}\n', {"chat": True, "field": "messages"}, ["a message of from, value"]),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', {"chat": True}, ["only messages", "set field"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "words"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_files_that_cannot_be_used(
    name: str, content: bytes, options: dict[str, Any], words: list[str], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    text = said(lambda: build(spec(tmp_path / name, **options), tokenizers["chat"], 0))
    assert text.startswith(str(tmp_path / name))
    assert all(word in text for word in words), text


def test_more_files_that_cannot_be_used(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    def tried(source: Path | str, tokenizer: str = "plain", **options: Any) -> str:
        return said(lambda: build(spec(source, **options), tokenizers[tokenizer], 0))

    assert "no such file" in tried(tmp_path / "none.jsonl")
    (tmp_path / "folder.txt").mkdir()
    assert "a directory" in tried(tmp_path / "folder.txt")
    one, other = lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl")
    assert f"those of {one}" in said(lambda: build(spec(one, other), tokenizers["plain"], 0))
    talks = jsonl(tmp_path / "t.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
    assert "user first" in tried(talks, "picky", chat=True, field="messages")
    for name, column, got in (("x", [1, 2], "int64"), ("y", [["a"], ["b"]], "list<"), ("z", ["a", None], "null")):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        assert got in tried(tmp_path / f"{name}.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"txt": ["a"], "id": [1]}), tmp_path / "w.parquet")
    assert "only id, txt (did you mean 'txt'?)" in tried(tmp_path / "w.parquet")
    damaged = bytearray((tmp_path / "z.parquet").read_bytes())
    damaged[4:24] = b"\xff" * 20
    (tmp_path / "z.parquet").write_bytes(damaged)
    assert "a sound parquet file" in tried(tmp_path / "z.parquet")


def test_dictionary_columns_are_texts(demo_model: Path, tmp_path: Path) -> None:
    column = pyarrow.array(TEXTS).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert build(spec(tmp_path / "a.parquet"), demo_model, 0).sources[0].total == 60


def test_a_pipe_by_name_and_a_byte_order_mark(demo_model: Path, tmp_path: Path) -> None:
    content = lines(tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert build(spec(tmp_path / "b.jsonl"), demo_model, 0).sources[0].total == 60
    os.mkfifo(tmp_path / "c.jsonl")
    writer = subprocess.Popen(["cp", tmp_path / "a.jsonl", tmp_path / "c.jsonl"])
    piped = build(spec(tmp_path / "c.jsonl"), demo_model, 0)
    assert writer.wait(10) == 0
    assert piped.digest == build(spec(tmp_path / "a.jsonl"), demo_model, 0).digest


def test_limits_of_the_model(demo_model: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    assert build(spec(source), demo_model, 0, vocabulary=1024, positions=32)
    text = said(lambda: build(spec(tmp_path / "not even there.txt"), demo_model, 0, positions=31), UsageError)
    assert "at most 31" in text
    most = int(build(spec(source), demo_model, 0).tensors["input_ids"].max())
    assert build(spec(source), demo_model, 0, vocabulary=most + 1)
    assert f"id {most}," in said(lambda: build(spec(source), demo_model, 0, vocabulary=most))
    text = said(lambda: build(spec(source), demo_model, 0, vocabulary=100))
    assert text.startswith(str(demo_model))
    assert "ids below 100" in text
    assert "the token '" in text


def test_tokenizers_that_will_not_do(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source, folder = lines(tmp_path / "a.jsonl"), tmp_path / "model"

    def tried(kind: type[CompressError], where: Path = folder, **options: Any) -> str:
        return said(lambda: build(spec(source, **options), where, 0), kind)

    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "no file of a tokenizer" in tried(InputError)
    assert "no file of a tokenizer" in tried(InputError, tmp_path / "none")
    (folder / "tokenizer.json").write_text("{")
    assert "transformers can load" in tried(InputError)
    assert "chat template" in tried(UsageError, tokenizers["plain"], chat=True)
    assert "has BOS" in tried(UsageError, tokenizers["bare"], bos="always")
    assert "has EOS" in tried(UsageError, tokenizers["bare"], join="eos")
    assert "room for tokens" in tried(UsageError, tokenizers["both"], length=2, packing="pad")
    assert build(spec(source, length=2), tokenizers["both"], 0)


def test_padding_has_ids_that_the_model_knows(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["short"])
    for vocabulary, fill in ((1025, 1024), (None, 1024), (1024, EOS)):
        corpus = build(spec(source, samples=1, packing="pad"), tokenizers["pad"], 0, vocabulary=vocabulary)
        assert corpus.tensors["input_ids"][0, -1] == fill
    assert build(spec(source, samples=1, packing="pad"), tokenizers["bare"], 0).tensors["input_ids"][0, -1] == 0


def test_code_of_a_tokenizer_is_not_run(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "vocab.json").write_text("{}")
    (folder / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "not run" in said(lambda: build(spec(lines(tmp_path / "a.jsonl")), folder, 0))
    assert not (tmp_path / "ran").exists()


def test_a_dataset_of_a_folder(demo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl")
    lines(folder / "test.jsonl", TEXTS[:30])
    assert build(spec(f"hf:{folder}", split="test"), demo_model, 0).sources[0].total == 30
    assert build(spec(f"hf:{folder}", split="train[:20]+test[:5]"), demo_model, 0).sources[0].total == 25

    def tried(name: str, kind: type[CompressError] = InputError, **options: Any) -> str:
        return said(lambda: build(spec(name, **options), demo_model, 0), kind)

    assert "one of 'train', 'test'" in tried(f"hf:{folder}", split="validation")
    assert "a config: one of 'default'" in tried(f"hf:{folder}:other")
    assert "only other, text" in tried(f"hf:{folder}", field="texts")
    assert "int64" in tried(f"hf:{folder}", field="other")
    assert "neither" in tried(f"hf:{tmp_path / 'none'}")
    assert "neither" in tried("hf:a b")
    (tmp_path / "empty").mkdir()
    assert "files" in tried(f"hf:{tmp_path / 'empty'}")
    for name in ("json", "pandas"):
        assert "the name of a file format" in tried(f"hf:{name}")
    (folder / "set.py").write_text("raise SystemExit('ran')\n")
    assert "code of its own" in tried(f"hf:{folder}")


def test_a_dataset_of_the_hub_is_recorded_with_its_commit(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    whole = datasets.Dataset.from_dict({"text": TEXTS})

    def builder(path: str, name: str, *, revision: str, trust_remote_code: bool | None = None) -> Any:
        asked.append((path, name, revision, trust_remote_code))
        return SimpleNamespace(hash="ab" * 20, download_and_prepare=lambda: None, as_dataset=lambda split: whole)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    corpus = build(spec("hf:owner/name:cfg@v1"), demo_model, 0)
    assert asked == [("owner/name", "cfg", "v1", False)]
    (record,) = corpus.sources
    assert (record.name, record.revision, record.sha256, record.total) == ("hf:owner/name:cfg", "ab" * 20, None, 60)
    assert record.fingerprint == whole._fingerprint
    assert rows(corpus) == slow_windows(demo_model, TEXTS, "0/hf:owner/name:cfg train", 6, 32, [], [EOS])


def test_what_the_hub_raises_becomes_a_message(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    url, token = "https://host/file?X-Amz-Signature=abc", "hf_secret123"
    cases: list[tuple[Exception, type[CompressError], str]] = [
        (datasets.exceptions.DatasetNotFoundError(f"Dataset 'o/n' doesn't exist {url}"), InputError, "neither, or a private one"),
        (datasets.exceptions.DatasetNotFoundError(f"Dataset 'o/n' is a gated dataset {token}"), MachineError, "it is gated"),
        (ConnectionError(f"Couldn't reach 'o/n' {url} {token}"), MachineError, "no connection"),
        (OSError(28, "No space left on device", url), MachineError, "No space left"),
        (ValueError("Config name is missing.\nPlease pick one among: ['en', 'de']"), InputError, "one of 'en', 'de'"),
        (RuntimeError("Dataset scripts are no longer supported, but found n.py"), InputError, "refused"),
        (RuntimeError(f"{url} {token}"), InputError, "RuntimeError"),
    ]
    for error, kind, words in cases:

        def builder(*names: Any, error: Exception = error, **options: Any) -> Any:
            assert not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)
            raise error

        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        level = logging.getLogger("huggingface_hub").level
        text = said(lambda: build(spec("hf:o/n"), demo_model, 0), kind)
        assert logging.getLogger("huggingface_hub").level == level
        assert words in text
        assert text.startswith("hf:o/n\n")
        assert url not in text
        assert token not in text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names, **options: open_nothing())
    assert "HF_HUB_OFFLINE" in said(lambda: build(spec("hf:o/n"), demo_model, 0), MachineError)


def open_nothing() -> None:
    raise ConnectionError("Couldn't reach it")


@pytest.mark.parametrize(("missing", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:o/n")])
def test_a_missing_library_is_named(
    missing: str, source: str, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), "a.parquet")
    monkeypatch.setitem(sys.modules, missing, None)
    assert f"pip install {missing}" in said(lambda: build(spec(source), demo_model, 0), MachineError)


def test_a_full_disk_is_named(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "TMPDIR" in said(lambda: build(spec(tmp_path / "a.txt.gz"), demo_model, 0), MachineError)


def test_the_spec_needs_no_torch() -> None:
    code = "import sys, compress.corpus; assert not {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
