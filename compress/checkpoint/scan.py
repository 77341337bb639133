"""Scan: one read of the whole source, for its digests and for NaN and Inf.

Gives the sha256 of every tensor and side file. Steps are named after this content, so the same input is
recognised whatever its path or sharding; and a tensor that is copied unchanged needs no second hash.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

from compress.checkpoint.manifest import content_fingerprint, hash_json
from compress.checkpoint.reader import ADAPTER_CONFIG, Checkpoint, read_json, torch_dtype
from compress.checkpoint.remote_code import code_of
from compress.context import Context
from compress.errors import InputError, Problem
from compress.threads import workers


@dataclass(frozen=True)
class SourceScan:
    """The content of a checkpoint: digests by tensor and by side file, and the fingerprint over both."""

    digests: dict[str, str]
    files: dict[str, str]
    fingerprint: str
    nonfinite: tuple[str, ...] = ()
    code: dict[str, str] = field(default_factory=dict)
    """sha256 of the Python files that may be run."""


def scan_source(checkpoint: Checkpoint, ctx: Context, allow_nonfinite: bool = False) -> SourceScan:
    """Reads every byte once. Raises InputError for NaN or Inf, or where a manifest's digest does not match."""
    names = list(checkpoint.refs)
    for file in {ref.file for ref in checkpoint.refs.values()}:
        checkpoint.descriptor(file)
    total, done = checkpoint.nbytes, [0]
    lock = threading.Lock()

    def one(name: str) -> tuple[str, bool]:
        digest, finite = hashlib.sha256(), True
        dtype = checkpoint.refs[name].dtype
        for chunk in checkpoint.chunks(name):
            digest.update(chunk)
            finite = finite and _finite(chunk, dtype)
            with lock:
                done[0] += len(chunk)
                ctx.tell("progress", step="read", phase="read", done_bytes=done[0], total_bytes=total)
        return digest.hexdigest(), finite

    with workers(min(ctx.threads, 8)) as pool:
        results = list(pool.map(one, names))
    digests = {name: result[0] for name, result in zip(names, results, strict=True)}
    nonfinite = tuple(name for name, result in zip(names, results, strict=True) if not result[1])
    if nonfinite and not allow_nonfinite:
        raise InputError(
            [Problem(f"{checkpoint.refs[n].file}: '{n}'", "finite numbers", "NaN or Inf",
                     "repair the checkpoint, or pass --allow-nonfinite") for n in nonfinite[:20]]
        )  # fmt: skip
    manifest = checkpoint.manifest
    if manifest is not None:
        if changed := [name for name in names if manifest.digests[name] != digests[name]]:
            raise InputError(
                f"{checkpoint.path}: '{changed[0]}'", "the bytes that manifest.json names", "other bytes", "make it anew"
            )
        for name, digest in manifest.files.items():
            path = checkpoint.path / name
            if not path.is_file() or digest not in (file_digest(path), _placeless(path, name)):
                got = "other bytes" if path.is_file() else "no such file"
                raise InputError(str(path), "the bytes that manifest.json names", got, "make the checkpoint anew")
        return SourceScan(digests, dict(manifest.files), manifest.fingerprint, nonfinite, code_of(checkpoint))
    files = {name: file_digest(checkpoint.path / name) for name in ("config.json", *checkpoint.side_files)}
    return SourceScan(digests, files, content_fingerprint(digests, files), nonfinite, code_of(checkpoint))


def file_digest(path: Path) -> str:
    """sha256 of a file. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(str(path), "a readable file", error.strerror or str(error)) from None


def text_digest(name: str, text: str) -> str:
    """sha256 of a text that is written as a file; for an adapter's config without the path of its base, which may change."""
    if name == ADAPTER_CONFIG:
        return hash_json({**json.loads(text), "base_model_name_or_path": None})
    return hashlib.sha256(text.encode()).hexdigest()


def _placeless(path: Path, name: str) -> str:
    """`text_digest` of an adapter's config; empty for other files."""
    if name != ADAPTER_CONFIG:
        return ""
    return text_digest(name, json.dumps(read_json(path)))


def same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors are equal, bit by bit."""
    a, b = checkpoint.refs.get(one), checkpoint.refs.get(other)
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip(checkpoint.chunks(one), checkpoint.chunks(other), strict=True))


def _finite(chunk: memoryview, dtype: str) -> bool:
    """Whether floats are finite. The sum is finite if all are; if it is not, each is checked, for the sum may overflow."""
    if dtype not in ("F16", "BF16", "F32", "F64") or not chunk:
        return True
    import torch

    values = torch.frombuffer(chunk, dtype=torch_dtype(dtype))
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
