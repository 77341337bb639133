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
from typing import Any

from compress.errors import InputError
from compress.spec.strict_json import parse_json
from compress.spec.weight_state import DTYPE_BYTES, TensorSpec

MAX_HEADER_BYTES = 100_000_000
_ALIGN = 8
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
    whole = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if len(whole) > _MOST_DIMENSIONS + 2:
        raise bad(f"at most {_MOST_DIMENSIONS} dimensions for '{name}'", f"{len(shape)}")
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= _LARGEST for n in whole) or len(offsets) != 2:
        raise bad(f"a shape and two offsets of whole numbers for '{name}'", f"{shape}, {offsets}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise bad(f"{nbytes} bytes for '{name}' {dtype} {shape}", f"{offsets[1] - offsets[0]} bytes")
    return TensorRef(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def write_header(specs: Iterable[TensorSpec], metadata: dict[str, str]) -> bytes:
    """The length and JSON header of a file with these tensors in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header's bytes, its tensors in order."""

    file: str
    header: bytes
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...] = ()
    """Where each tensor begins in a file that has gaps between them; without, they lie one after the other."""
    size_bytes: int = 0
    """The size of a file with gaps."""

    @property
    def nbytes(self) -> int:
        return self.size_bytes or len(self.header) + sum(spec.nbytes for spec in self.specs)

    @property
    def places(self) -> list[tuple[TensorSpec, int]]:
        """Every tensor, with its offset in the file."""
        starts = self.offsets or accumulate((spec.nbytes for spec in self.specs), initial=len(self.header))
        return list(zip(self.specs, starts, strict=False))


def single(file: str, specs: Iterable[TensorSpec]) -> Shard:
    """One file with these tensors, however large."""
    run = tuple(specs)
    return Shard(file, write_header(run, {"format": "pt"}), run)


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
    total = sum(spec.nbytes for shard in shards for spec in shard.specs)
    # As json.dumps indents it, which takes many times as long for an index of hundreds of thousands of names.
    quoted = json.JSONEncoder().encode
    lines = sorted((spec.name, quoted(shard.file)) for shard in shards for spec in shard.specs)
    weight_map = ",\n".join(f"    {quoted(name)}: {file}" for name, file in lines)
    text = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n{weight_map}\n  }}\n}}\n'
    return shards[0].file.split("-")[0] + ".safetensors.index.json", text
