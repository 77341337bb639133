"""Encoder: streams, windows, packed documents and padding are what one document after another gives; chat, BOS and EOS."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from compress.corpus import Corpus, build, encoder
from compress.corpus.encoder import Encoder
from compress.errors import CompressError, InputError, UsageError
from corpus.oracle import (
    BOS,
    EOS,
    TALKS,
    TEXTS,
    ids_of,
    jsonl,
    lines,
    packed_rows,
    rows,
    said,
    sha256,
    slow_documents,
    slow_order,
    slow_parts,
    slow_windows,
    spec,
)

JOINED: list[Any] = [
    ("plain", {}, [], [EOS]),
    ("plain", {"join": "none"}, [], []),
    ("plain", {"bos": "always"}, [BOS], [EOS]),
    ("bos", {}, [BOS], [EOS]),
    ("bos", {"bos": "never", "join": "eos"}, [], [EOS]),
    ("both", {}, [BOS], [EOS]),
    ("bare", {}, [], []),
    ("bos", {"join": "none"}, [BOS], []),
]
"""A tokenizer, options, and what they put before a document and after it."""


@pytest.mark.parametrize(("tokenizer", "options", "prefix", "joint"), JOINED)
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


@pytest.mark.parametrize(("tokenizer", "options", "prefix", "joint"), [*JOINED, ("two", {"join": "none"}, [BOS, EOS], [])])
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
