"""GGUF headers: read with every check, written before the data.

A file is "GGUF", u32 version, u64 number of tensors, u64 number of keys; the keys, each with the type of its value; the tensors'
names, dimensions (innermost first), types and offsets; zeros up to a multiple of the alignment; and the tensors, each padded to
such a multiple. All of it is little-endian. As for safetensors, headers are read through `read(offset, length)`, and nothing is
allocated for a count before the file is known to have room for it.

A stack of matrices (the experts of a block) is seen as its matrices, NAME[0], NAME[1], ..., which lie one after the other; a type
in blocks is seen as bytes [rows, bytes of a row], and `TensorRef.kind` tells its name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compress.checkpoint.safetensors_header import TensorRef
from compress.errors import InputError
from compress.spec.gguf_types import BY_NUMBER, GgufType

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_HEADER_BYTES = 400_000_000
_MOST_KEYS, _MOST_TENSORS, _LONGEST_KEY, _LONGEST_NAME = 1 << 16, 1 << 17, 1 << 10, 63
_MOST_MATRICES, _LARGEST = 1 << 12, (1 << 63) - 1
_NUMBERS_OF_A_STACK = "_exps.scale"
_CHUNK = 1 << 20
_SAID = 200
"""Characters of a header that a message quotes."""
_SCALARS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"), 6: ("f32", "f"),
    7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_NUMBERS = {name: number for number, (name, _) in _SCALARS.items()} | {"str": _STRING}
_FORMATS = dict(_SCALARS.values())


@dataclass(frozen=True)
class Entry:
    """One key to be written. `type` is that of the value, or of the elements of a list."""

    key: str
    type: str
    value: Any


@dataclass(frozen=True)
class Info:
    """One tensor to be written, whole: a matrix, or a stack of them."""

    name: str
    type: GgufType
    shape: tuple[int, ...]
    """As torch has it, outermost first, in values."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.weights * self.type.nbytes


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a file says."""

    metadata: dict[str, Any]
    refs: list[TensorRef]
    header_bytes: int
    """Where the tensors begin."""


class _Cursor:
    """Reads forward, a chunk of the file at a time. Raises InputError where the file ends."""

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int, bad: Callable[[str, str], InputError]) -> None:
        self.read, self.size, self.bad = read, size_bytes, bad
        self.at, self.start, self.chunk = 0, 0, b""

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if count > min(self.size, MAX_HEADER_BYTES) - self.at:
            raise self.bad(f"{count} bytes of {what} at byte {self.at}", f"a header that ends before: the file has {self.size}")
        begin = self.at - self.start
        if begin + count > len(self.chunk):
            self.start, begin = self.at, 0
            self.chunk = self.read(self.at, min(max(count, _CHUNK), self.size - self.at))
        self.at += count
        return self.chunk[begin : begin + count]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str, longest: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q", what)
        if length > longest:
            raise self.bad(f"{what} of at most {longest} bytes", f"one of {length}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what} in UTF-8", "other bytes") from None

    def value(self, key: str) -> Any:
        kind = self.number("I", f"the type of '{key}'")
        if kind == _STRING:
            return self.text(f"'{key}'")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind][1], f"'{key}'")
        if kind != _ARRAY:
            raise self.bad(f"a known type of '{key}'", f"type {kind}")
        inner, count = self.number("I", f"the type of '{key}'"), self.number("Q", f"the length of '{key}'")
        if inner not in _SCALARS and inner != _STRING:
            raise self.bad(f"numbers or texts in '{key}'", f"values of type {inner}")
        # Each text has a length of eight bytes.
        least = count * (8 if inner == _STRING else struct.calcsize(f"<{_SCALARS[inner][1]}"))
        if least > self.size - self.at:
            raise self.bad(
                f"{count} values of '{key}', {least} bytes or more", f"{self.size - self.at} bytes are left of the file"
            )
        if inner == _STRING:
            return [self.text(f"a value of '{key}'") for _ in range(count)]
        return list(struct.unpack(f"<{count}{_SCALARS[inner][1]}", self.take(least, f"'{key}'")))


def read_gguf(read: Callable[[int, int], bytes], size_bytes: int, file: str) -> GgufHeader:
    """The header of one file. `size_bytes` is the whole file's size. Raises InputError."""

    def bad(expected: str, got: str) -> InputError:
        # A broken header may hold text of any length.
        got = got if len(got) <= _SAID else f"{got[:_SAID]}..."
        return InputError(file, expected, got, "fetch the file again, or make it anew with llama.cpp")

    cursor = _Cursor(read, size_bytes, bad)
    if size_bytes < 24 or (magic := cursor.take(4, "the magic")) != MAGIC:
        raise bad("a GGUF file", f"{size_bytes} bytes" if size_bytes < 24 else f"a file that begins with {magic!a}")
    version = cursor.number("I", "the version")
    if version not in (2, VERSION):
        kind = "big-endian" if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3) and version > 255 else "version"
        raise bad("GGUF version 2 or 3, little-endian", f"a {kind} file" if kind != "version" else f"version {version}")
    tensors, keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
        raise bad(f"at most {_MOST_TENSORS} tensors and {_MOST_KEYS} keys", f"{tensors} and {keys}")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text("a key", _LONGEST_KEY)
        if not key.isprintable() or not key:
            raise bad("keys of printable characters", ascii(key))
        if key in metadata:
            raise bad("each key once", f"'{key}' twice")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise bad("an alignment that is a power of two", f"{alignment}")
    infos = [_tensor(cursor, bad) for _ in range(tensors)]
    if len({info.name for info, _ in infos}) != len(infos):
        names = sorted(info.name for info, _ in infos)
        raise bad("each tensor once", f"'{next(a for a, b in pairwise(names) if a == b)}' twice")
    start = _up(cursor.at, alignment)
    return GgufHeader(metadata, _placed(infos, start, alignment, size_bytes, file, bad), start)


def _tensor(cursor: _Cursor, bad: Callable[[str, str], InputError]) -> tuple[Info, int]:
    """The next tensor, and its offset."""
    name = cursor.text("a tensor's name", _LONGEST_NAME)
    # A name gets printed, and a bracket tells the matrices of a stack.
    if not name or not name.isprintable() or "[" in name:
        raise bad("names of printable characters without '['", ascii(name))
    count = cursor.number("I", f"the dimensions of '{name}'")
    if not 1 <= count <= 4:
        raise bad(f"1 to 4 dimensions of '{name}'", str(count))
    sizes = [cursor.number("Q", f"the dimensions of '{name}'") for _ in range(count)]
    number, offset = cursor.number("I", f"the type of '{name}'"), cursor.number("Q", f"the offset of '{name}'")
    if number not in BY_NUMBER:
        raise bad(f"a known type of '{name}'", f"type {number}")
    kind = BY_NUMBER[number]
    if not all(sizes) or math.prod(sizes) > _LARGEST:
        raise bad(f"dimensions of '{name}' that a file can hold", f"{sizes}")
    if sizes[0] % kind.weights:
        raise bad(f"rows of '{name}' in whole blocks of {kind.weights}, as {kind.name} has them", f"rows of {sizes[0]}")
    return Info(name, kind, tuple(reversed(sizes))), offset


def _placed(
    infos: Sequence[tuple[Info, int]], start: int, alignment: int, size_bytes: int, file: str,
    bad: Callable[[str, str], InputError],
) -> list[TensorRef]:  # fmt: skip
    """The tensors where they lie: one after the other, in the order of the header, as llama.cpp demands."""
    at, end, refs = start, start, []
    for info, offset in infos:
        if start + offset != at:
            kind = "overlaps the one before it" if start + offset < at else "leaves a gap before it"
            raise bad("tensors one after the other, each padded to the alignment", f"'{info.name}' {kind}")
        end = at + info.nbytes
        if end > size_bytes:
            raise bad(f"a file of {end} bytes or more, for '{info.name}'", f"{size_bytes} bytes (truncated)")
        if (len(info.shape) == 3 or info.name.endswith(_NUMBERS_OF_A_STACK)) and info.shape[0] > _MOST_MATRICES:
            raise bad(f"at most {_MOST_MATRICES} matrices in '{info.name}'", str(info.shape[0]))
        refs += _matrices(info, at, file)
        at = _up(end, alignment)
    if size_bytes > at:
        raise bad(f"a file of {at} bytes, as its header says", f"{size_bytes} bytes (trailing bytes)")
    return refs


def _matrices(info: Info, at: int, file: str) -> list[TensorRef]:
    """A tensor, or the matrices of a stack, or their numbers."""
    stack = len(info.shape) == 3 or (len(info.shape) == 1 and info.name.endswith(_NUMBERS_OF_A_STACK))
    kind, count = info.type, info.shape[0] if stack else 1
    rows = info.shape[1:] if stack else info.shape
    shape = (*rows[:-1], rows[-1] // kind.weights * kind.nbytes) if kind.dtype == "U8" else rows
    each = info.nbytes // count
    names = [f"{info.name}[{i}]" for i in range(count)] if stack else [info.name]
    return [TensorRef(name, kind.dtype, shape, file, at + i * each, each, kind.name) for i, name in enumerate(names)]


def _up(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(entry: Entry) -> bytes:
    """The type and the value of a key."""
    number = _NUMBERS[entry.type]
    if not isinstance(entry.value, list):
        data = _text(entry.value) if entry.type == "str" else struct.pack(f"<{_FORMATS[entry.type]}", entry.value)
        return struct.pack("<I", number) + data
    head = struct.pack("<IIQ", _ARRAY, number, len(entry.value))
    if entry.type == "str":
        return head + b"".join(map(_text, entry.value))
    return head + struct.pack(f"<{len(entry.value)}{_FORMATS[entry.type]}", *entry.value)


def write_gguf(entries: Sequence[Entry], infos: Sequence[Info]) -> tuple[bytes, dict[str, int], int]:
    """(the header with the zeros after it, where each tensor begins, the bytes of the whole file)."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(entries))]
    parts += [_text(entry.key) + _value(entry) for entry in entries]
    offsets, at = {}, 0
    for info in infos:
        offsets[info.name] = at
        parts.append(_text(info.name) + struct.pack("<I", len(info.shape)))
        parts.append(struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape)) + struct.pack("<IQ", info.type.number, at))
        at = _up(at + info.nbytes, ALIGNMENT)
    header = b"".join(parts)
    header += bytes(_up(len(header), ALIGNMENT) - len(header))
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + at
