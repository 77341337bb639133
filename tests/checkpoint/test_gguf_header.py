"""GGUF headers: what is written reads back, here and by the package gguf, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.checkpoint.gguf_header import Entry, GgufHeader, Info, read_gguf, write_gguf
from compress.errors import InputError
from compress.spec.gguf_types import TYPES

ENTRIES = [
    Entry("general.architecture", "str", "llama"), Entry("llama.block_count", "u32", 2), Entry("a.float", "f32", 0.5),
    Entry("a.bool", "bool", True), Entry("a.texts", "str", ["a", "", "\u2581é"]), Entry("a.numbers", "i32", [-1, 3]),
    Entry("a.floats", "f32", [1.5, -2.0]), Entry("a.empty", "str", []),
]  # fmt: skip
INFOS = [
    Info("a.weight", TYPES["F32"], (3,)), Info("b.weight", TYPES["Q4_0"], (5, 64)), Info("c.weight", TYPES["Q8_0"], (2, 3, 32)),
    Info("d.weight", TYPES["BF16"], (7, 3)),
]  # fmt: skip


def read(data: bytes) -> GgufHeader:
    return read_gguf(lambda offset, length: data[offset : offset + length], len(data), "f.gguf")


def whole(entries: list[Entry] = ENTRIES, infos: list[Info] = INFOS) -> bytes:
    header, _, size = write_gguf(entries, infos)
    return header + bytes(size - len(header))


def test_what_is_written_reads_back() -> None:
    data = whole()
    found, (_, starts, size) = read(data), write_gguf(ENTRIES, INFOS)
    assert found.metadata == {entry.key: entry.value for entry in ENTRIES}
    assert size == len(data)
    assert [(ref.name, ref.kind, ref.dtype, ref.shape, ref.nbytes) for ref in found.refs] == [
        ("a.weight", "F32", "F32", (3,), 12), ("b.weight", "Q4_0", "U8", (5, 36), 180),
        ("c.weight[0]", "Q8_0", "U8", (3, 34), 102), ("c.weight[1]", "Q8_0", "U8", (3, 34), 102),
        ("d.weight", "BF16", "BF16", (7, 3), 42),
    ]  # fmt: skip
    for ref in found.refs:
        assert ref.offset == starts[ref.name.partition("[")[0]] + (102 if ref.name.endswith("[1]") else 0)
    assert all(start % 32 == 0 for start in starts.values())


def test_the_package_gguf_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    (tmp_path / "f.gguf").write_bytes(whole())
    reader = gguf.GGUFReader(tmp_path / "f.gguf")
    for entry in ENTRIES:
        assert reader.fields[entry.key].contents() == entry.value
    assert [(t.name, t.tensor_type.name, tuple(reversed([int(n) for n in t.shape]))) for t in reader.tensors] == [
        (info.name, info.type.name, info.shape) for info in INFOS
    ]


def test_its_table_of_types_is_the_packages() -> None:
    constants = pytest.importorskip("gguf.constants")
    for name, kind in TYPES.items():
        number = constants.GGMLQuantizationType[name]
        assert (kind.number, (kind.weights, kind.nbytes)) == (int(number), constants.GGML_QUANT_SIZES[number])


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_float64("a.double", 0.25)
    writer.add_custom_alignment(64)
    written = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("x.weight", written)
    writer.add_tensor("y.weight", np.ones((3, 2, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    data = (tmp_path / "f.gguf").read_bytes()
    found = read(data)
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert (found.metadata["llama.block_count"], found.metadata["a.double"]) == (2, 0.25)
    x = found.refs[0]
    assert np.frombuffer(data[x.offset : x.offset + x.nbytes], np.float32).tolist() == written.reshape(-1).tolist()
    assert [ref.name for ref in found.refs[1:]] == ["y.weight[0]", "y.weight[1]", "y.weight[2]"]


def test_reads_are_small_and_inside_the_file() -> None:
    """A file of 100 MB: the header is read in chunks, and no tensor is."""
    header, _, size = write_gguf(
        [*ENTRIES, Entry("a.long", "str", ["x" * 100] * 30_000)], [Info("w", TYPES["F32"], (25_000_000,))]
    )
    reads: list[tuple[int, int]] = []

    def at(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        assert 0 <= offset <= offset + length <= size
        return header[offset : offset + length].ljust(length, b"\0")

    assert len(read_gguf(at, size, "f.gguf").refs) == 1
    assert max(length for _, length in reads) <= 1 << 20
    assert sum(length for _, length in reads) < len(header) + (8 << 20)


@pytest.mark.parametrize("count", [1 << 62, 1 << 40, 1 << 31])
def test_absurd_counts_allocate_nothing(count: int) -> None:
    import struct

    key = struct.pack("<Q", 1) + b"a"
    for value in (struct.pack("<IIQ", 9, 8, count), struct.pack("<IIQ", 9, 4, count), struct.pack("<IQ", 8, count)):
        data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value
        with pytest.raises(InputError) as caught:
            read(data)
        assert len(str(caught.value)) < 600


def changed(**fields: Any) -> list[Info]:
    return [Info(fields.get("name", info.name), info.type, info.shape) if i == 3 else info for i, info in enumerate(INFOS)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (whole()[:-50], "truncated"),
        (whole() + bytes(40), "trailing bytes"),
        (whole(infos=changed(name="a.weight")), "'a.weight' twice"),
        (whole(infos=changed(name="d\x1b[2J")), "printable"),
        (whole(infos=changed(name="d[0]")), "without '['"),
        (whole(infos=changed(name="d" * 64)), "at most 63"),
        (whole([*ENTRIES, ENTRIES[0]]), "'general.architecture' twice"),
        (whole([*ENTRIES, Entry("general.alignment", "u32", 48)]), "power of two"),
        (b"GGUF" + b"\0\0\0\3" + whole()[8:], "big-endian"),
        (b"GGUF" + b"\1\0\0\0" + whole()[8:], "version 1"),
        (b"GGML" + whole()[4:], "begins with"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("[", r"\[")):
        read(data)
