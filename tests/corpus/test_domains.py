"""Domains: no document is in both parts of a source, sources do not affect each other, and too few texts are told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from compress.corpus import Corpus, DomainSpec, build_domains, domain_names
from compress.errors import InputError
from corpus.oracle import TEXTS, ids_of, lines, said


def of(*data: Path | str, **options: Any) -> DomainSpec:
    return DomainSpec(**{"data": tuple(map(str, data)), "samples": 6, "length": 32, "held_out": 64, **options})


def part(corpus: Corpus, domain: int, held: bool, name: str = "input_ids") -> torch.Tensor:
    marks = corpus.tensors
    return marks[name][(marks["domain"] == domain) & (marks["held_out"] == held)]


def letters(path: Path, count: int = 40, words: int = 30) -> Path:
    """Documents of one repeated word each, so that a token tells the document that it is from."""
    return lines(path, [f"{i:03d} " * words for i in range(count)])


@pytest.mark.parametrize("packing", ["documents", "concatenate", "pad"])
def test_nothing_of_a_held_out_document_is_trained_on(packing: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """With more samples asked for than there are, so that every document that is left is trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers["plain"])
    data = [letters(tmp_path / "a.jsonl"), letters(tmp_path / "b.jsonl", 23, 90)]
    corpus = build_domains(of(*data, samples=500, held_out=128, packing=packing), tokenizers["plain"], 0)
    for domain, count in enumerate((40, 23)):
        seen = []
        for held in (True, False):
            text = " ".join(tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in part(corpus, domain, held))
            seen.append({word for word in text.split() if len(word) == 3 and word.isdigit()})
        assert len(part(corpus, domain, True)) == 4
        assert seen[0]
        assert not seen[0] & seen[1]
        assert len(seen[0] | seen[1]) >= count - 1, "the last may lie in a window that was not filled"


@pytest.mark.parametrize("kind", ["parquet", "dataset", "jsonl.gz"])
def test_other_kinds_of_sources_are_split_alike(kind: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Those that read several rows together, too: a token of a document says which one it is from."""
    content = letters(tmp_path / "made.jsonl", 300, 12)
    if kind == "parquet":
        texts = [json.loads(line)["text"] for line in content.read_text().splitlines()]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    elif kind == "dataset":
        (tmp_path / "set").mkdir()
        content.rename(tmp_path / "set" / "train.jsonl")
    else:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.read_bytes()))
    source = f"hf:{tmp_path / 'set'}" if kind == "dataset" else str(tmp_path / f"a.{kind}")
    corpus = build_domains(of(source, samples=500, packing="pad"), tokenizers["plain"], 0)
    held, trained = ({tuple(row) for row in part(corpus, 0, held).tolist()} for held in (True, False))
    assert (len(held), len(trained)) == (2, 298)
    assert not held & trained


def test_the_seed_fixes_it_and_sources_do_not_affect_each_other(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl"), letters(tmp_path / "b.jsonl")
    both = build_domains(of(a, b), tokenizers["plain"], 3)
    assert both.digest == build_domains(of(a, b), tokenizers["plain"], 3).digest
    assert both.digest != build_domains(of(a, b), tokenizers["plain"], 4).digest
    turned = build_domains(of(b, a), tokenizers["plain"], 3)
    more = build_domains(of(a, b, samples=9), tokenizers["plain"], 3)
    for held in (True, False):
        assert torch.equal(part(both, 0, held), part(turned, 1, held))
        assert torch.equal(part(both, 1, held), part(more, 1, held)[:6])
    assert [(record.name, record.samples) for record in both.sources] == [("a.jsonl", 8), ("b.jsonl", 8)]


def test_a_source_gives_what_it_has(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    data = letters(tmp_path / "a.jsonl", 12), letters(tmp_path / "b.jsonl", 300)
    corpus = build_domains(of(*data, samples=100), tokenizers["plain"], 0)
    few = sum(len(ids) + 1 for ids in ids_of(tokenizers["plain"], [f"{i:03d} " * 30 for i in range(12)]))
    assert 10 < len(part(corpus, 0, False)) <= few // 32
    assert len(part(corpus, 1, False)) == 100


def test_where_a_tenth_has_too_few_tokens_more_documents_are_held_out(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Four documents: a tenth is one of them, and a half is two."""
    data = [lines(tmp_path / name, [f"{name} {i} " * 40 for i in range(4)]) for name in ("a.jsonl", "b.jsonl")]
    one = ids_of(tokenizers["plain"], ["a.jsonl 1 " * 40])[0]
    assert len(one) > 96
    corpus = build_domains(of(*data, held_out=32, samples=99), tokenizers["plain"], 0)
    more = build_domains(of(*data, held_out=len(one) + 20, samples=99), tokenizers["plain"], 0)
    assert len(part(corpus, 0, True)) == 1
    assert len(part(more, 0, True)) > len(one) // 32
    assert len(part(corpus, 0, False)) > len(part(more, 0, False)) > 0
    told = said(lambda: build_domains(of(*data, held_out=10_000), tokenizers["plain"], 0))
    assert "a.jsonl" in told
    assert "in the half that may be held out" in told
    assert "lower held_out, now 10000 tokens" in told


def test_rows_of_ready_inputs_are_split(tmp_path: Path) -> None:
    ids = torch.arange(10 * 24).reshape(10, 24)
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for number, path in enumerate(paths):
        save_file({"input_ids": ids + 1000 * number}, path)
    corpus = build_domains(of(*paths, held_out=30, samples=99), tmp_path, 0)
    for domain in (0, 1):
        held, trained = part(corpus, domain, True), part(corpus, domain, False)
        assert (len(held), len(trained)) == (2, 8)
        assert sorted(row[0] for row in torch.cat([held, trained]).tolist()) == (ids[:, 0] + 1000 * domain).tolist()
    told = said(lambda: build_domains(of(*paths, held_out=240), tmp_path, 0))
    assert "a.safetensors" in told
    assert "more than 10 samples: 10 of 24 tokens are held out, for held_out=240" in told
    save_file({"input_features": torch.ones(3, 4, 5)}, paths[0])
    assert "input_ids [samples, tokens]" in said(lambda: build_domains(of(paths[0]), tmp_path, 0))


@pytest.mark.parametrize("texts", [[], ["", "  ", "\n", " "], ["one document only, which cannot be in both parts"]])
def test_a_domain_without_text_is_refused_by_its_name(texts: list[str], tokenizers: dict[str, Path], tmp_path: Path) -> None:
    data = lines(tmp_path / "full.jsonl"), lines(tmp_path / "empty.jsonl", texts)
    assert "empty.jsonl" in said(lambda: build_domains(of(*data), tokenizers["plain"], 0))


def test_a_damaged_document_is_told_at_its_own_line(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", TEXTS[:20])
    content = path.read_text().splitlines()
    content[7] = content[7].replace('"text"', '"body"')
    path.write_text("\n".join(content))
    with pytest.raises(InputError, match=r"a\.jsonl:8"):
        build_domains(of(path, lines(tmp_path / "b.jsonl"), samples=99), tokenizers["plain"], 0)


def test_sources_of_one_name_are_numbered(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    data = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        data.append(lines(tmp_path / str(number) / "a.jsonl", TEXTS[number:]))
    assert domain_names(build_domains(of(*data), tokenizers["plain"], 0).sources) == ["a.jsonl", "a.jsonl (2)", "a.jsonl (3)"]
