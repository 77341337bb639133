"""Safetensors headers that are damaged, or made to deceive."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input.bench import Case

FILE, NAME = "model.safetensors", "model.norm.weight"
Edit = Callable[[dict[str, Any]], object]


def parts(model: Path) -> tuple[bytes, bytes]:
    """Header and payload of the model's file."""
    data = (model / FILE).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end], data[end:]


def raw(header: bytes, payload: bytes = b"", length: int | None = None) -> Callable[[Path], object]:
    """A file with these bytes for a header."""
    size = struct.pack("<Q", len(header) if length is None else length)
    return lambda model: (model / FILE).write_bytes(size + header + payload)


def edit(change: Edit) -> Callable[[Path], object]:
    """Changes the header; the payload stays."""

    def spoil(model: Path) -> None:
        header, payload = parts(model)
        content = json.loads(header)
        change(content)
        raw(json.dumps(content).encode(), payload)(model)

    return spoil


def field(key: str, value: object) -> Callable[[Path], object]:
    """Another value of one field of one tensor."""
    return edit(lambda header: header[NAME].update({key: value}))


def cut(model: Path) -> None:
    (model / FILE).write_bytes((model / FILE).read_bytes()[:-10])


def twice(model: Path) -> None:
    header, payload = parts(model)
    entry = json.dumps({NAME: json.loads(header)[NAME]})[1:-1].encode()
    raw(b"{" + entry + b"," + header.lstrip()[1:], payload)(model)


def swap_offsets(header: dict[str, Any]) -> None:
    """Two tensors of one size over the same bytes, and a hole where one of them was."""
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    header[second]["data_offsets"] = header[first]["data_offsets"]


def shift(header: dict[str, Any]) -> None:
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [n + 8 for n in last["data_offsets"]]


BYTES = "fetch the file again, or save it anew with safetensors"
CASES = {
    "empty file": Case(3, (FILE, "a safetensors file", "0 bytes", BYTES), spoil=lambda m: (m / FILE).write_bytes(b"")),
    "shorter than a length": Case(3, ("a safetensors file", "3 bytes"), spoil=lambda m: (m / FILE).write_bytes(b"abc")),
    "oversized length": Case(3, ("a header of at most", "a header length of 9223372036854775808"), spoil=raw(b"{}", length=1 << 63)),
    "a length beyond the file": Case(3, ("a header length of 1000", "truncated"), spoil=raw(b"{}", length=1000)),
    "truncated": Case(3, ("as its header says", "truncated", BYTES), spoil=cut),
    "trailing bytes": Case(3, ("as its header says", "trailing bytes"), spoil=lambda m: (m / FILE).open("ab").write(b"more")),
    "no JSON": Case(3, ("a header that is a JSON object", "property name"), spoil=raw(b"{nope}")),
    "not UTF-8": Case(3, ("a header that is a JSON object", "utf-8"), spoil=raw(b'{"\xff\xfe":1}')),
    "a list": Case(3, ("a header that is a JSON object", "not an object"), spoil=raw(b"[]")),
    "deeply nested": Case(3, ("a header that is a JSON object", "nested more than 100 levels"), spoil=raw(b'{"a":' * 100_000)),
    "the same tensor twice": Case(3, ("a header that is a JSON object", f"'{NAME}' occurs twice"), spoil=twice),
    "overlapping offsets": Case(3, ("tensors one after the other", "overlaps the one before it"), spoil=edit(swap_offsets)),
    "a gap": Case(3, ("tensors one after the other", "leaves a gap before it"), spoil=edit(shift)),
    "unknown dtype": Case(3, (f"a known dtype for '{NAME}'", "'BF17'"), spoil=field("dtype", "BF17")),
    "a list for a dtype": Case(3, (f"a known dtype for '{NAME}'", "['BF16']"), spoil=field("dtype", ["BF16"])),
    "negative shape": Case(3, ("whole numbers", "[-64]"), spoil=field("shape", [-64])),
    "fractional shape": Case(3, ("whole numbers", "[64.5]"), spoil=field("shape", [64.5])),
    "a truth value in a shape": Case(3, ("whole numbers", "[True, 64]"), spoil=field("shape", [True, 64])),
    "huge shape": Case(3, ("whole numbers", "[1000000000000"), spoil=field("shape", [10**300, 10**300])),
    "a million dimensions": Case(3, ("at most 64 dimensions", "1000000"), spoil=field("shape", [2] * 1_000_000)),
    "a shape that its bytes do not fill": Case(3, (f"256 bytes for '{NAME}' BF16 [128]", "128 bytes"), spoil=field("shape", [128])),
    "offsets backwards": Case(3, (f"128 bytes for '{NAME}'", "-128 bytes"), spoil=edit(lambda h: h[NAME]["data_offsets"].reverse())),
    "one offset": Case(3, ("two offsets",), spoil=edit(lambda h: h[NAME]["data_offsets"].pop())),
    "no dtype": Case(3, (f"dtype, shape and data_offsets for '{NAME}'", "something else"), spoil=edit(lambda h: h[NAME].pop("dtype"))),
    "an unknown field": Case(3, (f"dtype, shape and data_offsets for '{NAME}'",), spoil=field("device", "cuda")),
    "a number for a tensor": Case(3, (f"dtype, shape and data_offsets for '{NAME}'",), spoil=edit(lambda h: h.update({NAME: 3}))),
    "metadata of numbers": Case(3, ("__metadata__ of texts",), spoil=edit(lambda h: h.update(__metadata__={"format": 1}))),
    "half a character in a name": Case(3, ("a header that is a JSON object", "surrogates not allowed"), spoil=edit(lambda h: h.update({"\ud800": h.pop(NAME)}))),
    "a name that clears the screen": Case(3, ("printable characters", "'\\x1b[2J'"), spoil=edit(lambda h: h.update({"\x1b[2J": h.pop(NAME)}))),
}  # fmt: skip
