"""Safetensors headers: read with every check, written before the data.

A file is `u64 n`, n bytes of JSON, then the tensors without gaps. Headers are read through a function
`read(offset, length)`, so that a local file and a range request to the Hub take the same checks. Raises
InputError for a header that is truncated, oversized, overlapping, duplicated or does not fill its file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from json.encoder import encode_basestring as quoted
from json.encoder import encode_basestring_ascii as escaped
from typing import Any

from compress.errors import InputError
from compress.spec.strict_json import parse_json
from compress.spec.weight_state import DTYPE_BYTES, TensorSpec, payload_bytes

MAX_HEADER_BYTES = 100_000_000
_ALIGN = 8
_METADATA = {"format": "pt"}
_SAID = 300
"""Characters of a header that a message quotes."""
_MOST_DIMENSIONS, _LARGEST = 64, (1 << 63) - 1
STEM, CANONICAL_STEM = "model", "canonical"
"""File names of shards. Canonical codes have their own: transformers only warns of a `quant_method` it does not
know, and then fills the weights at random; a missing model.safetensors makes it stop."""


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor's bytes lie: file name in the checkpoint, absolute offset in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    kind: str = ""
    """The name of its type in a GGUF file, whose blocks count as bytes here."""


def read_header(read: Callable[[int, int], bytes], size_bytes: int, file: str) -> tuple[list[TensorRef], dict[str, str]]:
    """The tensors of one file, by offset, and its metadata. `size_bytes` is the whole file's size."""

    def bad(expected: str, got: str) -> InputError:
        # A broken header may hold text of any length.
        got = got if len(got) <= _SAID else f"{got[:_SAID]}..."
        return InputError(file, expected, got, "fetch the file again, or save it anew with safetensors")

    if size_bytes < 8:
        raise bad("a safetensors file", f"{size_bytes} bytes")
    length = struct.unpack("<Q", read(0, 8))[0]
    if length > min(size_bytes - 8, MAX_HEADER_BYTES):
        raise bad(
            f"a header of at most {min(size_bytes - 8, MAX_HEADER_BYTES)} bytes (the file has {size_bytes})",
            f"a header length of {length}: truncated, or not a safetensors file",
        )
    try:
        header = parse_json(read(8, length))
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise bad("a header that is a JSON object", str(error)) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("__metadata__ of texts", "something else")
    start, refs = 8 + length, []
    for name, entry in header.items():
        refs.append(_entry(name, entry, start, file, bad))
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    at = start
    for ref in refs:
        if ref.offset != at:
            kind = "overlaps the one before it" if ref.offset < at else "leaves a gap before it"
            raise bad("tensors one after the other", f"'{ref.name}' {kind}")
        at += ref.nbytes
    if at != size_bytes:
        kind = "truncated" if at > size_bytes else "trailing bytes"
        raise bad(f"a file of {at} bytes, as its header says", f"{size_bytes} bytes ({kind})")
    return refs, metadata


def _entry(name: str, entry: Any, start: int, file: str, bad: Callable[[str, str], InputError]) -> TensorRef:
    # A name gets printed, and written into other files.
    if not name.isprintable() or len(name) > _SAID:
        raise bad(f"names of at most {_SAID} printable characters", ascii(name))
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(f"dtype, shape and data_offsets for '{name}'", "something else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise bad(f"a known dtype for '{name}'", f"'{dtype}'")
    whole: list[Any] = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if len(whole) > _MOST_DIMENSIONS + 2:
        raise bad(f"at most {_MOST_DIMENSIONS} dimensions for '{name}'", f"{len(shape)}")
    if {*map(type, whole)} != {int} or min(whole) < 0 or max(whole) > _LARGEST or len(offsets) != 2:
        raise bad(f"a shape and two offsets of whole numbers for '{name}'", f"{shape}, {offsets}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise bad(f"{nbytes} bytes for '{name}' {dtype} {shape}", f"{offsets[1] - offsets[0]} bytes")
    return TensorRef(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def write_header(specs: Iterable[TensorSpec], metadata: dict[str, str]) -> bytes:
    """The length and JSON header of a file with these tensors in this order, padded to 8 bytes."""
    # As json.dumps writes it, which takes three times as long.
    entries, at = [f'"__metadata__":{json.dumps(metadata, separators=(",", ":"), ensure_ascii=False)}'] if metadata else [], 0
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, dtype, shape, nbytes in specs:
        if (kind := (dtype, shape)) not in kinds:
            kinds[kind] = f'"dtype":"{dtype}","shape":[{",".join(map(str, shape))}]'
        entries.append(f'{quoted(name)}:{{{kinds[kind]},"data_offsets":[{at},{at + nbytes}]}}')
        at += nbytes
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Shard:
    """One output file: its name, the size of its header, its tensors in order."""

    file: str
    header_bytes: int
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...] = ()
    """Where each tensor begins in a file that has gaps between them; without, they lie one after the other."""
    size_bytes: int = 0
    """The size of a file with gaps."""
    other_header: bytes = b""
    """The header of a file that is not in safetensors."""

    @property
    def header(self) -> bytes:
        """Made anew, for headers of a large model are hundreds of megabytes, and a plan only counts them."""
        return self.other_header or write_header(self.specs, _METADATA)

    @property
    def nbytes(self) -> int:
        return self.size_bytes or self.header_bytes + payload_bytes(self.specs)

    @property
    def places(self) -> list[tuple[TensorSpec, int]]:
        """Every tensor, with its offset in the file."""
        starts = self.offsets or accumulate((spec.nbytes for spec in self.specs), initial=self.header_bytes)
        return list(zip(self.specs, starts, strict=False))


def single(file: str, specs: Iterable[TensorSpec]) -> Shard:
    """One file with these tensors, however large."""
    run = tuple(specs)
    return Shard(file, len(write_header(run, _METADATA)), run)


def arrange(specs: Iterable[TensorSpec], shard_bytes: int, stem: str = STEM) -> list[Shard]:
    """Cuts tensors into shards of at most `shard_bytes` (one tensor may exceed it), named as transformers does."""
    runs: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if runs[-1] and filled + spec.nbytes > shard_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(spec)
        filled += spec.nbytes
    count = len(runs)
    names = [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [single(name, run) for name, run in zip(names, runs, strict=True)]


def index_file(shards: list[Shard]) -> tuple[str, str] | None:
    """Name and text of the index (`model.safetensors.index.json`), None for a single file. Files in folders are not in it."""
    shards = [shard for shard in shards if "/" not in shard.file]
    if len(shards) <= 1:
        return None
    # As json.dumps indents it, which takes many times as long for an index of hundreds of thousands of names.
    files = {spec.name: file for shard in shards for file in (escaped(shard.file),) for spec in shard.specs}
    lines = ",\n".join([f"    {escaped(name)}: {files[name]}" for name in sorted(files)])
    return shards[0].file.split("-")[0] + ".safetensors.index.json", _index_text(shards, lines)


def index_bytes(shards: list[Shard]) -> int:
    """The size of the text of `index_file`, which need not be sorted and put together for it; 0 for a single file."""
    shards = [shard for shard in shards if "/" not in shard.file]
    if len(shards) <= 1:
        return 0
    names = [spec.name for shard in shards for spec in shard.specs]
    files = sum(len(escaped(shard.file)) * len(shard.specs) for shard in shards)
    return len(_index_text(shards, "")) + sum(map(len, map(escaped, names))) + files + len("    : ,\n") * len(names) - len(",\n")


def _index_text(shards: list[Shard], lines: str) -> str:
    total = sum(payload_bytes(shard.specs) for shard in shards)
    return f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n{lines}\n  }}\n}}\n'
