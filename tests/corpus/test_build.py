"""Build: each kind of source gives what a slow reading gives, the seed fixes it, and a saved corpus comes back."""

from __future__ import annotations

import gzip
import io
import shutil
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from compress.corpus import Corpus, build
from compress.errors import InputError, MachineError
from corpus.oracle import EOS, TEXTS, ids_of, lines, rows, said, sha256, slow_order, slow_parts, slow_windows, spec


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
