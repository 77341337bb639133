"""Safetensors headers: what safetensors writes is read, what is broken is refused, what we write it reads."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from compress.checkpoint.safetensors_header import arrange, index_bytes, index_file, read_header, write_header
from compress.errors import InputError
from compress.spec.weight_state import TensorSpec


def parse(data: bytes) -> list:
    return read_header(lambda offset, length: data[offset : offset + length], len(data), "f.safetensors")[0]


def build(header: object, payload: bytes = b"", raw: bytes | None = None) -> bytes:
    text = raw if raw is not None else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(0, 2, dtype=torch.bfloat16), "d": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    refs = {ref.name: ref for ref in parse((tmp_path / "x.safetensors").read_bytes())}
    assert {name: ref.shape for name, ref in refs.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert refs["c"].dtype == "BF16"


BROKEN = {
    "empty file": (b"", "0 bytes"),
    "shorter than a length": (b"\x01\x02", "2 bytes"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "header length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "header length"),
    "not JSON": (build(None, raw=b"{nope}"), "JSON"),
    "not UTF-8": (build(None, raw=b"\xff\xfe"), "JSON"),
    "a list": (build([]), "JSON"),
    "the same key twice": (build(None, b"\0\0", raw=b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'), "twice"),
    "unknown dtype": (build({"a": entry(0, 1, dtype="F7")}, b"\0"), "F7"),
    "negative shape": (build({"a": entry(0, 1, [-1])}, b"\0"), "-1"),
    "text for a shape": (build({"a": entry(0, 1, "x")}, b"\0"), "shape"),
    "a boolean offset": (build({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, b"\0"), "whole numbers"),
    "bytes that do not fit the shape": (build({"a": entry(0, 3, [2])}, b"\0\0\0"), "3 bytes"),
    "overlap": (build({"a": entry(0, 2), "b": entry(1, 3)}, b"\0\0\0"), "overlaps"),
    "gap": (build({"a": entry(0, 1), "b": entry(2, 3)}, b"\0\0\0"), "gap"),
    "does not start at zero": (build({"a": entry(1, 2)}, b"\0\0"), "gap"),
    "truncated payload": (build({"a": entry(0, 4)}, b"\0\0"), "truncated"),
    "trailing bytes": (build({"a": entry(0, 1)}, b"\0\0\0"), "trailing"),
    "a missing field": (build({"a": {"dtype": "U8", "shape": [1]}}, b"\0"), "data_offsets"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_in_words(case: str) -> None:
    data, said = BROKEN[case]
    with pytest.raises(InputError) as caught:
        parse(data)
    assert said in str(caught.value)
    assert caught.value.problems[0].where == "f.safetensors"


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)).map(build)
)
def test_any_bytes_are_a_header_or_an_error_of_ours(data: bytes) -> None:
    with contextlib.suppress(InputError):
        parse(data)


def test_what_we_write_safetensors_reads(tmp_path: Path) -> None:
    specs = [TensorSpec("x", "F32", (2, 3)), TensorSpec("y.é", "I64", (2,)), TensorSpec("z", "U8", (0,))]
    data = write_header(specs, {"format": "pt"}) + bytes(sum(spec.nbytes for spec in specs))
    (tmp_path / "w.safetensors").write_bytes(data)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert {name: tuple(file.get_tensor(name).shape) for name in file.keys()} == {s.name: s.shape for s in specs}  # noqa: SIM118
    assert [(ref.name, ref.shape) for ref in parse(data)] == [(s.name, s.shape) for s in specs]


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "said": '"\u00e9"'}])
def test_headers_are_written_as_json_dumps_writes_them(metadata: dict[str, str]) -> None:
    specs = [TensorSpec('"quoted" \\ \u00e9', "F32", (2, 3)), TensorSpec("scalar", "BF16", ()), TensorSpec("none", "U8", (0, 7))]
    data = write_header(specs, metadata)
    text = data[8:].decode()
    assert struct.unpack("<Q", data[:8])[0] == len(data) - 8
    assert text.rstrip(" ") == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
    assert [*json.loads(text)] == [*(["__metadata__"] if metadata else []), *(spec.name for spec in specs)]


def test_shards_are_cut_and_indexed() -> None:
    specs = [TensorSpec(f't{i}"\u00e9', "U8", (40,)) for i in range(5)] + [TensorSpec("big", "U8", (500,))]
    shards = arrange(specs, 100)
    assert [len(shard.specs) for shard in shards] == [2, 2, 1, 1]
    assert shards[0].file == "model-00001-of-00004.safetensors"
    name, text = index_file(shards) or ("", "")
    index = json.loads(text)
    assert text == json.dumps(index, indent=2) + "\n"
    assert name == "model.safetensors.index.json"
    assert index["metadata"]["total_size"] == 700
    assert index["weight_map"]["big"] == "model-00004-of-00004.safetensors"
    assert [*index["weight_map"]] == sorted(index["weight_map"]), "by name, as transformers writes it"
    assert index_bytes(shards) == len(text)
    assert index_file(arrange(specs, 10_000)) is None
    assert index_bytes(arrange(specs, 10_000)) == 0
