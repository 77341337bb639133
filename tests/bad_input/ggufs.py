"""GGUF files that are damaged, or made to deceive."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from bad_input.bench import Case

FILE = "model.gguf"
ARGV = "run {model} {out} -p 'unpack | pack'"
AGAIN = "fetch the file again, or make it anew with llama.cpp"
TENSORS, KEYS, FIRST = 8, 16, 24
"""Where the counts lie, and the length of the first key."""


def put(at: int, form: str, value: int) -> Callable[[Path], object]:
    """Another number at a place."""

    def spoil(model: Path) -> None:
        data = bytearray((model / FILE).read_bytes())
        struct.pack_into(form, data, at, value)
        (model / FILE).write_bytes(data)

    return spoil


def swap(old: bytes, new: bytes) -> Callable[[Path], object]:
    """Other bytes of the same number, where they first occur."""
    assert len(old) == len(new)
    return lambda model: (model / FILE).write_bytes((model / FILE).read_bytes().replace(old, new, 1))


def after(name: bytes, skip: int, form: str, value: int) -> Callable[[Path], object]:
    """Another number, `skip` bytes after a name."""

    def spoil(model: Path) -> None:
        data = bytearray((model / FILE).read_bytes())
        struct.pack_into(form, data, data.index(name) + len(name) + skip, value)
        (model / FILE).write_bytes(data)

    return spoil


def cut(length: int) -> Callable[[Path], object]:
    return lambda model: (model / FILE).write_bytes((model / FILE).read_bytes()[:length])


def more(model: Path) -> None:
    with (model / FILE).open("ab") as stream:
        stream.write(bytes(100))


def pickled(model: Path) -> None:
    (model / FILE).write_bytes(b"\x80\x04\x95" + bytes(100))


def linked(model: Path) -> None:
    (model / FILE).rename(model.parent / "elsewhere.gguf")
    (model / FILE).symlink_to(model.parent / "elsewhere.gguf")


def piped(model: Path) -> None:
    (model / FILE).unlink()
    os.mkfifo(model / FILE)


NAME, KEY = b"blk.0.attn_q.weight", b"llama.block_count"
# After a name of a matrix: u32 dimensions, two u64 of them, u32 type, u64 offset.
CASES = {
    "empty file": Case(3, (FILE, "a GGUF file", "0 bytes", AGAIN), ARGV, cut(0), "gguf"),
    "cut in the header": Case(3, (FILE, "a header that ends before", AGAIN), ARGV, cut(200), "gguf"),
    "cut in the tensors": Case(3, (FILE, "truncated", AGAIN), ARGV, cut(-1000), "gguf"),
    "trailing bytes": Case(3, (FILE, "trailing bytes", AGAIN), ARGV, more, "gguf"),
    "another magic": Case(3, ("a GGUF file", "a file that begins with b'GGML'"), ARGV, swap(b"GGUF", b"GGML"), "gguf"),
    "a pickle by that name": Case(3, ("a GGUF file", "a file that begins with"), ARGV, pickled, "gguf"),
    "version 1": Case(3, ("GGUF version 2 or 3", "version 1"), ARGV, put(4, "<I", 1), "gguf"),
    "version 900": Case(3, ("GGUF version 2 or 3", "version 900"), ARGV, put(4, "<I", 900), "gguf"),
    "big-endian": Case(3, ("little-endian", "a big-endian file"), ARGV, put(4, ">I", 3), "gguf"),
    "absurdly many tensors": Case(3, ("at most 131072 tensors", str(1 << 60)), ARGV, put(TENSORS, "<Q", 1 << 60), "gguf"),
    "absurdly many keys": Case(3, ("65536 keys", str(1 << 40)), ARGV, put(KEYS, "<Q", 1 << 40), "gguf"),
    "a key of exabytes": Case(3, ("a key of at most 1024 bytes", str(1 << 62)), ARGV, put(FIRST, "<Q", 1 << 62), "gguf"),
    "a text of terabytes": Case(3, ("'general.architecture'", "bytes"), ARGV, after(b"general.architecture", 4, "<Q", 1 << 42), "gguf"),
    "an unknown type of a value": Case(3, (f"a known type of '{KEY.decode()}'", "type 77"), ARGV, after(KEY, 0, "<I", 77), "gguf"),
    "a list in a list": Case(3, ("numbers or texts in 'tokenizer.ggml.tokens'", "values of type 9"), ARGV, after(b"tokenizer.ggml.tokens", 4, "<I", 9), "gguf"),
    "a list of exabytes": Case(3, ("values of 'tokenizer.ggml.tokens'", "are left of the file"), ARGV, after(b"tokenizer.ggml.tokens", 8, "<Q", 1 << 59), "gguf"),
    "a text that is no UTF-8": Case(3, ("in UTF-8", "other bytes"), ARGV, swap(b"general.type", b"general.\xff\xfepe"), "gguf"),
    "a key that clears the screen": Case(3, ("keys of printable characters", "\\x1b[2J"), ARGV, swap(b"general.type", b"gene\x1b[2Jtype"[:12]), "gguf"),
    "the same tensor twice": Case(3, ("each tensor once", "'blk.0.attn_k.weight' twice"), ARGV, swap(NAME, b"blk.0.attn_k.weight"), "gguf"),
    "a tensor with a bracket": Case(3, ("without '['",), ARGV, swap(NAME, b"blk.0.attn_[.weight"), "gguf"),
    "nine dimensions": Case(3, ("1 to 4 dimensions", "9"), ARGV, after(NAME, 0, "<I", 9), "gguf"),
    "a huge dimension": Case(3, (f"dimensions of '{NAME.decode()}' that a file can hold",), ARGV, after(NAME, 12, "<Q", 1 << 61), "gguf"),
    "a dimension of zero": Case(3, (f"dimensions of '{NAME.decode()}' that a file can hold",), ARGV, after(NAME, 12, "<Q", 0), "gguf"),
    "rows that no blocks fill": Case(3, ("in whole blocks of 32", "rows of 33"), ARGV, after(NAME, 4, "<Q", 33), "gguf"),
    "an unknown type": Case(3, (f"a known type of '{NAME.decode()}'", "type 5000"), ARGV, after(NAME, 20, "<I", 5000), "gguf"),
    "an offset outside": Case(3, ("tensors one after the other", "leaves a gap before it"), ARGV, after(NAME, 24, "<Q", 1 << 50), "gguf"),
    "overlapping offsets": Case(3, ("tensors one after the other", "overlaps the one before it"), ARGV, after(NAME, 24, "<Q", 0), "gguf"),
    "an architecture that is not here": Case(3, ("an architecture among llama", "'rwkv7'"), ARGV, swap(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0rwkv7"), "gguf"),
    "a missing key": Case(3, ("the keys of llama", "none for num_hidden_layers"), ARGV, swap(KEY, b"llama.block_xount"), "gguf"),
    "a link out of its directory": Case(3, ("a file of this directory, or a link to one", "a link out of it"), ARGV, linked, "gguf"),
    "a pipe": Case(3, ("a file", "a pipe"), ARGV, piped, "gguf"),
    "two files": Case(3, ("one GGUF file", "--merge"), ARGV, lambda m: (m / "other.gguf").write_bytes(b"GGUF"), "gguf"),
}  # fmt: skip
