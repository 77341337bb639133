"""Documents: a source is counted and hashed once; documents are read when drawn.

For files of lines the offsets are kept, for parquet the row groups; a document is parsed when it is drawn. A .txt is one text,
cut at ends of lines into documents of about 64 KiB. stdin is lines of JSON if it begins with an object, else a text; stdin and
.gz files are copied into a temporary file. `datasets` prepares datasets and keeps them on disk; their own code is never run.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import zlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

from compress.corpus.spec import kind_of, split_name
from compress.errors import CompressError, InputError, MachineError, did_you_mean

_PIECE = 1 << 16
_ROWS = 256
"""Rows that are read together, so that a row group is decoded once for all of them."""
_TEXT_TYPES = ("string", "large_string", "string_view")
_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*(\[\s*)?\{")


class Documents(ABC):
    """One source: `count` documents by number."""

    name: str
    """As the user wrote it; for messages."""
    label: str
    """The name without paths of this machine; for the manifest."""
    key: str
    """Seeds its shuffle: the content's digest, or a dataset's name, config and split."""
    count: int
    sha256: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    @abstractmethod
    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Number and content of documents, in the order of `numbers`. Raises InputError."""

    def where(self, number: int) -> str:
        """A document's place, for messages."""
        return f"{self.name}: row {number + 1}"


def open_documents(source: str, field: str, split: str, chat: bool, stack: ExitStack) -> Documents:
    """Opens a source; its files stay open as long as `stack`. Raises InputError, MachineError."""
    documents: Documents
    kind = kind_of(source)
    if kind == "dataset":
        documents = _Dataset(source, field, split, chat)
    else:
        stream = _open(source, stack)
        if kind == "stdin":
            kind = "lines" if _JSON.match(stream.read(_PIECE)) else "text"
        if kind == "parquet":
            documents = _Parquet(source, stream, field, chat)
        elif kind == "lines":
            documents = _Lines(source, stream, field)
        elif chat:
            raise InputError(source, "records with conversations", "a text", "set chat=false, or give a .jsonl or .parquet file")
        else:
            documents = _Pieces(source, stream)
    if kind != "dataset":
        documents.label = os.path.basename(source)
    if not documents.count:
        raise InputError(source, "at least one document", "none", "leave it out, or check how it was made")
    return documents


def file_at(source: str) -> Path:
    """The path of a file that is there. Raises InputError."""
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise InputError(source, "a file", "no such file", "check the path; before a dataset's name write hf:")
    if path.is_dir():
        raise InputError(source, "a file", "a directory", "name the files in it; for a folder of a dataset write hf:")
    return path


def digest_of(stream: BinaryIO) -> str:
    """sha256 of a stream from its start."""
    digest = hashlib.sha256()
    stream.seek(0)
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _open(source: str, stack: ExitStack) -> BinaryIO:
    """A seekable stream of the content."""
    if source == "-":
        raw: Any = sys.stdin.buffer
    else:
        path = file_at(source)
        try:
            raw = stack.enter_context(open(path, "rb"))  # noqa: SIM115
        except OSError as error:
            raise InputError(source, "a readable file", error.strerror or str(error), "check its permissions") from None
        if source.lower().endswith(".gz"):
            raw = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif raw.seekable():
            return raw  # type: ignore[no-any-return]
    spool: Any = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (it closes with the stack)
    try:
        shutil.copyfileobj(raw, spool, 1 << 20)
        spool.seek(0)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(source, "a gzip file", str(error), "fetch or pack it again") from None
    except OSError as error:
        do = "free some space there, or set TMPDIR to another place"
        raise MachineError(tempfile.gettempdir(), f"room for what is in {source}", error.strerror or str(error), do) from None
    return spool  # type: ignore[no-any-return]


def _pick(record: Collection[str], field: str, where: str) -> None:
    """Raises InputError if a record, or a table's columns, lack `field`."""
    if field not in record:
        names = sorted(map(str, record))
        got = f"only {', '.join(names[:20])}{did_you_mean(field, names)}" if names else "no field at all"
        raise InputError(where, f"a field '{field}'", got, "set field to the one with the text or the conversation")


def _not_utf8(where: str, error: UnicodeDecodeError) -> InputError:
    got = f"the byte 0x{error.object[error.start]:02x} at {error.start + 1}"
    return InputError(where, "a text in UTF-8", got, "convert the file, e.g. with iconv")


def not_text(where: str, field: str, got: str) -> InputError:
    """The error for a field that is not a text."""
    return InputError(where, f"'{field}': a text", got, "set field to a text, or chat=true for conversations")


class _Lines(Documents):
    """JSON, one record in each line; blank lines are skipped."""

    def __init__(self, name: str, stream: BinaryIO, field: str) -> None:
        self.name, self.stream, self.field = name, stream, field
        self.starts, at, digest = array("Q"), 0, hashlib.sha256()
        stream.seek(0)
        for line in stream:
            digest.update(line)
            if not line.isspace():
                self.starts.append(at)
            at += len(line)
        self.count, self.sha256 = len(self.starts), digest.hexdigest()
        self.key = self.sha256
        if self.count:
            stream.seek(self.starts[0])
            if stream.read(4).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                do = "write one record a line: jq -c '.[]' in.json > out.jsonl"
                raise InputError(self.where(0), "one JSON object a line", "an array", do)

    def where(self, number: int) -> str:
        # Because of blank lines the line differs from the number; it is counted only for a message.
        self.stream.seek(0)
        left, line = self.starts[number], 1
        while left and (piece := self.stream.read(min(left, 1 << 20))):
            line, left = line + piece.count(b"\n"), left - len(piece)
        return f"{self.name}:{line}"

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            self.stream.seek(self.starts[number])
            data = self.stream.readline()
            try:
                record = json.loads(data.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise _not_utf8(self.where(number), error) from None
            except (ValueError, RecursionError) as error:
                got = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                do = "repair the line or take it out"
                raise InputError(self.where(number), "a JSON object in one line", got, do) from None
            if not isinstance(record, dict):
                do = "write one object a line, with the text in a field"
                raise InputError(self.where(number), "a JSON object", kind_word(record), do)
            if self.field not in record:
                _pick(record, self.field, self.where(number))
            yield number, record[self.field]


class _Pieces(Documents):
    """A text, cut at ends of lines; a line longer than a piece is cut between characters."""

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name, self.stream, self.ends = name, stream, array("Q")
        digest, at = hashlib.sha256(), 0
        stream.seek(0)
        while piece := stream.read(_PIECE):
            if not piece.endswith(b"\n"):
                piece += stream.readline(_PIECE)
            if not piece.endswith(b"\n"):
                for byte in iter(lambda: stream.read(1), b""):
                    if not 0x80 <= byte[0] < 0xC0:
                        stream.seek(-1, os.SEEK_CUR)
                        break
                    piece += byte
            digest.update(piece)
            at += len(piece)
            self.ends.append(at)
        self.count, self.sha256 = len(self.ends), digest.hexdigest()
        self.key = self.sha256

    def where(self, number: int) -> str:
        return f"{self.name}: after byte {self.ends[number - 1] if number else 0}"

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            start = self.ends[number - 1] if number else 0
            self.stream.seek(start)
            try:
                yield number, self.stream.read(self.ends[number] - start).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise _not_utf8(self.where(number), error) from None


def kind_word(value: Any) -> str:
    """The type of a JSON value, in words."""
    kinds = {"NoneType": "null", "bool": "a truth value", "str": "a text", "list": "a list", "dict": "an object"}
    return kinds.get(type(value).__name__, "a number")


def _batched(numbers: Iterable[int]) -> Iterator[list[int]]:
    rest = iter(numbers)
    while batch := list(islice(rest, _ROWS)):
        yield batch


class _Parquet(Documents):
    """A column of a parquet file."""

    def __init__(self, name: str, stream: BinaryIO, field: str, chat: bool) -> None:
        try:
            import pyarrow  # type: ignore[import-untyped]
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError:
            do = "pip install pyarrow, or convert the file to .jsonl"
            raise MachineError(name, "pyarrow, which reads parquet", "it is not installed", do) from None
        self.name, self.field = name, field
        self.sha256 = self.key = digest_of(stream)
        # pyarrow's errors derive from its own base, from OSError or ValueError; undecodable text is a UnicodeDecodeError.
        self.errors = (pyarrow.ArrowException, OSError, ValueError)
        with self._read_errors():
            self.file = pyarrow.parquet.ParquetFile(stream)
            schema, metadata = self.file.schema_arrow, self.file.metadata
            self.ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
        self.count = metadata.num_rows
        _pick(schema.names, field, name)
        column = schema.field(field).type
        kind = column.value_type if pyarrow.types.is_dictionary(column) else column
        if not chat and str(kind) not in _TEXT_TYPES:
            raise not_text(name, field, str(column))

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except self.errors as error:
            got = str(error).partition("\n")[0]
            raise InputError(self.name, "a sound parquet file", got, "fetch or write the file again") from None

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        for batch in _batched(numbers):
            wanted: dict[int, list[int]] = {}
            for number in batch:
                wanted.setdefault(bisect_right(self.ends, number), []).append(number)
            found: dict[int, Any] = {}
            for group, rows in wanted.items():
                at = self.ends[group - 1] if group else 0
                with self._read_errors():
                    for piece in self.file.iter_batches(_ROWS * 16, row_groups=[group], columns=[self.field]):
                        for number in rows:
                            if at <= number < at + piece.num_rows:
                                found[number] = piece.column(0)[number - at].as_py()
                        at += piece.num_rows
            yield from ((number, found[number]) for number in batch)


class _Dataset(Documents):
    """A split of a dataset of the Hub, or of a folder that `datasets` can load."""

    def __init__(self, name: str, field: str, split: str, chat: bool) -> None:
        try:
            import datasets
        except ImportError:
            do = "pip install datasets, or give a file"
            raise MachineError(name, "datasets, which loads hf: sources", "it is not installed", do) from None
        path, config, revision = split_name(name)
        path = os.path.expanduser(path)
        folder = os.path.isdir(path)
        # `datasets` takes the name of a file format as "all such files of the working directory", pickles included.
        if path in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
            do = f"name the file without hf:, or write hf:./{path} for a folder of that name"
            raise InputError(name, "a dataset's name", "the name of a file format", do)
        with _dataset_errors(name, split):
            # Old versions of `datasets` run scripts unless this is false; new ones never do, and do not know the option.
            known = inspect.signature(datasets.load_dataset_builder).parameters
            safe = {"trust_remote_code": False} if "trust_remote_code" in known else {}
            builder = datasets.load_dataset_builder(path, config, revision=revision, **safe)
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
            fingerprint = str(rows._fingerprint)
        _pick(rows.column_names, field, name)
        feature = rows.features[field]
        if not chat and getattr(feature, "dtype", None) not in _TEXT_TYPES:
            raise not_text(name, field, str(feature))
        self.name, self.field, self.count, self.rows = name, field, len(rows), rows.select_columns([field])
        # The path of a folder, and the times of its files, do not identify its content.
        named = f"hf:{os.path.basename(os.path.abspath(path))}" if folder else f"hf:{path}"
        self.label = f"{named}:{config}" if config else named
        self.key = f"{self.label} {split}"
        if not folder:
            commit = str(builder.hash)
            self.revision, self.fingerprint = commit if re.fullmatch("[0-9a-f]{40}", commit) else revision, fingerprint

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        for batch in _batched(numbers):
            yield from zip(batch, self.rows[batch][self.field], strict=True)


@contextmanager
def _dataset_errors(name: str, split: str) -> Iterator[None]:
    """Turns exceptions of `datasets` into our messages: its own texts and warnings may quote signed URLs."""
    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    except Exception as error:  # parsers and clients may raise anything
        raise _as_message(name, split, error) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _as_message(name: str, split: str, error: Exception) -> CompressError:
    kinds, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    listed = re.search(r"\[[^\[\]]*\]", text)
    known = f"one of {listed[0][1:-1]}" if listed else "one of its own"
    if text.startswith("Unknown split"):
        return InputError(name, f"a split: {known}", f"'{split}'", "set split to one of them")
    if re.match("BuilderConfig .* not found", text) or "Config name is missing" in text:
        config = split_name(name)[1]
        return InputError(name, f"a config: {known}", f"'{config}'" if config else "none", "write hf:NAME:CONFIG")
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        return InputError(
            name, "a dataset of files", "one that runs code of its own, which is refused", "give a file of its texts"
        )
    if "gated" in text:
        do = "ask for access on its page, then set HF_TOKEN to a token of that account"
        return MachineError(name, "access to the dataset", "it is gated, and no token with access is set", do)
    if kinds & {"DatasetNotFoundError", "HFValidationError"} or type(error) is FileNotFoundError:
        do = "check name and revision; if it is private, set HF_TOKEN to a token that may read it"
        return InputError(name, "a dataset of the Hub, or a folder", "neither, or a private one", do)
    if kinds & {"DataFilesNotFoundError", "EmptyDatasetError"}:
        return InputError(name, "a dataset with files of texts", "none that can be read", "give a file of its texts")
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "TransportError", "Timeout"}:
        off = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        got = "it is not in the cache, and the Hub is off (HF_HUB_OFFLINE)" if off else "no connection"
        do = ("unset HF_HUB_OFFLINE" if off else "check the network and HF_ENDPOINT") + ", or give a file"
        return MachineError(name, "an answer of the Hub", got, do)
    if isinstance(error, OSError) and error.errno is not None:
        do = "free some space there, or set HF_HOME to another place"
        return MachineError(name, "a place to write what is fetched", error.strerror or type(error).__name__, do)
    return InputError(name, "a dataset that `datasets` can load", type(error).__name__, "give a file of its texts")
