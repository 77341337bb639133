"""Documents: files, datasets and pipes are read to the end, or refused with what to do; nothing large is held."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from compress.corpus import build, documents
from compress.errors import CompressError, InputError, MachineError
from corpus.oracle import EOS, TEXTS, jsonl, lines, rows, said, slow_windows, spec


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
