"""Writer: writes shards behind precomputed headers, with a journal for resuming.

Every tensor's offset is known before any data exists, so tensors are written with pwrite in whatever order they
are ready, by several threads or ranks, with one tensor in memory. A weight that is written gets a line in the
journal; after a crash the same step reopens its `.tmp`, checks each journaled tensor against its sha256, and goes on.
Sealing means fsync of every file and of the directory; publishing means one rename, and fsync of the parent.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.manifest import FILE as MANIFEST
from compress.checkpoint.safetensors_header import Shard, index_file
from compress.errors import MachineError

if TYPE_CHECKING:
    import torch

    from compress.spec.weight_state import TensorSpec

_COPY_BYTES = 8 << 20
_STAMP, _JOURNAL = ".compress-step", ".compress-journal."
"""Working files of an unfinished directory; hidden, because hidden files never belong to a checkpoint."""


class Writer:
    """One unfinished output directory, at `path` (which ends in .tmp)."""

    def __init__(self, path: Path, shards: list[Shard], rank: int = 0) -> None:
        self.path, self.shards, self.rank = path, shards, rank
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, int]] = {}
        for shard in shards:
            self._places |= {spec.name: (shard.file, at, spec.nbytes) for spec, at in shard.places}
        self.journal: dict[str, dict[str, Any]] = {}

    def open(self, step_id: str) -> None:
        """Makes or reopens the directory. Weights that an interrupted run of the same step has finished are kept."""
        stamp = self.path / _STAMP
        # The same step in other shards has another layout: the data there cannot be used then.
        layout = hashlib.sha256()
        for shard in self.shards:
            layout.update(shard.header)
        step_id = f"{step_id} {layout.hexdigest()}"
        if self.path.exists() and (not stamp.is_file() or stamp.read_text() != step_id):
            shutil.rmtree(self.path)
        with _explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # Headers are written again on reopening, too: a power cut may have kept the stamp and lost a header.
            for shard in self.shards:
                (self.path / shard.file).parent.mkdir(exist_ok=True)
                descriptor = os.open(self.path / shard.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    _pwrite(descriptor, memoryview(shard.header), 0)
                    os.ftruncate(descriptor, shard.nbytes)
                finally:
                    os.close(descriptor)
            # The stamp is never rewritten: a kill between truncating and writing it would lose all that was journaled.
            if not stamp.is_file():
                stamp.write_text(step_id)

    def attach(self) -> None:
        """Opens the shards and reads the journals that an interrupted run left."""
        with _explained(self.path):
            for shard in self.shards:
                self._descriptors[shard.file] = os.open(self.path / shard.file, os.O_RDWR | os.O_CLOEXEC)
            self.journal = self.read_journals()
            self._journal_stream = open(self.path / f"{_JOURNAL}{self.rank}", "ab", buffering=0)  # noqa: SIM115
            # A crash may have cut the last line; the next one must begin on a new line.
            if self._journal_stream.tell():
                self._journal_stream.write(b"\n")

    def read_journals(self) -> dict[str, dict[str, Any]]:
        """Entries of every rank's journal by weight name; a line cut off by a crash is left out."""
        entries: dict[str, dict[str, Any]] = {}
        for file in sorted(self.path.glob(f"{_JOURNAL}*")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    entries[entry["weight"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue
        return entries

    def is_done(self, weight: str) -> bool:
        """Whether the journal has `weight` and the bytes on disk match its digests."""
        entry = self.journal.get(weight)
        return entry is not None and all(self._digest(name) == digest for name, digest in entry["digests"].items())

    def _digest(self, name: str) -> str:
        file, at, nbytes = self._places[name]
        digest = hashlib.sha256()
        for start in range(0, nbytes, _COPY_BYTES):
            digest.update(os.pread(self._descriptors[file], min(_COPY_BYTES, nbytes - start), at + start))
        return digest.hexdigest()

    def read(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor that was written earlier."""
        import torch

        from compress.checkpoint.reader import torch_dtype

        file, at, nbytes = self._places[spec.name]
        data, done = bytearray(nbytes), 0
        while done < nbytes:
            done += os.preadv(self._descriptors[file], [memoryview(data)[done:]], at + done)
        return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).reshape(spec.shape)

    def put(self, name: str, tensor: torch.Tensor) -> str:
        """Writes one tensor at its place; returns the sha256 of its bytes."""
        import torch

        file, at, nbytes = self._places[name]
        flat = tensor.contiguous().reshape(-1)
        assert flat.numel() * flat.element_size() == nbytes, (name, tensor.shape, tensor.dtype, nbytes)
        view = memoryview(flat.view(torch.uint8).numpy().data) if nbytes else memoryview(b"")
        with _explained(self.path):
            _pwrite(self._descriptors[file], view, at)
        return hashlib.sha256(view).hexdigest()

    def copy(self, name: str, source: int, offset: int) -> None:
        """Copies a tensor's bytes from an open file, inside the kernel where the file systems allow it."""
        file, at, nbytes = self._places[name]
        target, done = self._descriptors[file], 0
        with _explained(self.path):
            while done < nbytes:
                try:
                    moved = os.copy_file_range(source, target, nbytes - done, offset + done, at + done)
                except (AttributeError, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in (
                        errno.EXDEV,
                        errno.EINVAL,
                        errno.ENOSYS,
                        errno.EOPNOTSUPP,
                    ):
                        raise
                    piece = os.pread(source, min(_COPY_BYTES, nbytes - done), offset + done)
                    _pwrite(target, memoryview(piece), at + done)
                    moved = len(piece)
                if not moved:
                    raise MachineError(str(self.path), f"{nbytes} bytes of '{name}'", f"{done}: the source was cut")
                done += moved

    def record(self, weight: str, digests: dict[str, str], facts: dict[str, Any]) -> None:
        """Journals a finished weight. Its bytes were written before; a torn tensor fails its digest on resume."""
        entry = {"weight": weight, "digests": digests, **facts}
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock, _explained(self.path):
            self._journal_stream.write(line)
            self.journal[weight] = entry

    def detach(self) -> None:
        """Makes this rank's data durable and closes the shards."""
        with _explained(self.path):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
                os.close(descriptor)
            self._descriptors.clear()
            self._journal_stream.close()

    def check(self, entries: Mapping[str, dict[str, Any]]) -> None:
        """Reads what every rank has journaled. Raises MachineError for bytes that are not those that were written.

        Ranks of one host see each other's bytes. Of several hosts one may write back a whole page of a file, with what it has
        not yet seen of another's tensor in it; NFS does so where the page was read before.
        """
        with _explained(self.path):
            for shard in self.shards:
                self._descriptors[shard.file] = os.open(self.path / shard.file, os.O_RDONLY | os.O_CLOEXEC)
            written = [(name, digest) for entry in entries.values() for name, digest in entry["digests"].items()]
            torn = [name for name, digest in written if self._digest(name) != digest]
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
        if torn:
            do = "run again, which writes these anew; on one host, or on a file system that keeps what hosts write to a page"
            got = f"others, in {len(torn)} of {len(written)} tensors"
            raise MachineError(f"{self.path}: '{torn[0]}'", "the bytes that its process wrote", got, do)

    def seal(self, texts: dict[str, str], side_files: Mapping[str, Path]) -> None:
        """Adds index, texts and side files, by name, and makes everything durable; only the rename is left to do."""
        with _explained(self.path):
            index = index_file(self.shards)
            for name, text in [*([index] if index else []), *texts.items()]:
                (self.path / name).write_text(text, encoding="utf-8")
            for name, file in side_files.items():
                shutil.copyfile(file, self.path / name)
            for entry in self.path.rglob("*"):
                fsync(entry)
            fsync(self.path)
            # From here on the directory is complete; a run that finds this mark only has to rename it.
            (self.path / _STAMP).unlink()

    @property
    def sealed(self) -> bool:
        """Whether an earlier run has sealed the directory."""
        return (self.path / MANIFEST).is_file() and not (self.path / _STAMP).exists()

    def publish(self, target: Path, read_only: bool = False) -> None:
        """Renames the sealed directory to `target`."""
        with _explained(self.path):
            for hidden in self.path.glob(".*"):
                hidden.unlink()
            if read_only:
                for shard in self.shards:
                    os.chmod(self.path / shard.file, 0o444)
            fsync(self.path)
            os.rename(self.path, target)
            fsync(target.parent)


def fsync(path: Path) -> None:
    """Waits until a file's data, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pwrite(descriptor: int, view: memoryview, at: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], at + done)


class _explained:  # noqa: N801 (a context manager that reads as a word)
    """Turns an OSError on the way out into a message with the path and what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            do = "free some space and run the same command again: it goes on where it stopped"
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                do = "give the command a place it may write to"
            raise MachineError(str(self.path), "a place to write", error.strerror or str(error), do) from error
