"""Records: what was verified and measured of an artifact, bound to its bytes.

    verification.json   for each reader: whether it computed the logits of the decoded weights, with which version
    evaluation.json     quality on texts and tasks, of the artifact and of the steps that it was made by

Both lie in the artifact. They name the fingerprint of its manifest, which has the digests of every byte; a record of another
fingerprint is out of date, and is read as none. Whoever keeps one has just compared the bytes with those digests.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress import __version__
from compress.checkpoint.atomic import write_text
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import RECORDS
from compress.errors import InputError

EVALUATION, VERIFICATION = RECORDS


class _Record(BaseModel):
    # The files may come from elsewhere, with anything in them.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ReaderRecord(_Record):
    """What `verify` found of one reader."""

    passed: bool
    version: str = Field(default="", description="of the reader's own package")
    when: str = Field(default="", description="UTC")
    dtype: str = Field(default="", description="compute dtype of both sides")
    versions: dict[str, str] = Field(default_factory=dict, description="of the reader's packages")
    tokens: int = 0
    difference: float | None = Field(default=None, description="largest difference between logits")
    largest: float | None = Field(default=None, description="largest logit")
    kl: float | None = Field(default=None, description="KL(meaning || reader), mean over tokens, in nats")
    top1: float | None = Field(default=None, description="share of tokens with the same likeliest token")
    reason: str = Field(default="", description="why it did not pass")


class Verification(_Record):
    """The content of `verification.json`."""

    schema_version: Literal[1] = 1
    fingerprint: str
    readers: dict[str, ReaderRecord] = Field(default_factory=dict)

    @property
    def passed(self) -> dict[str, ReaderRecord]:
        """The readers that compute what the artifact means."""
        return {name: record for name, record in self.readers.items() if record.passed}


class Number(_Record):
    """A number and its standard error; null for one that does not exist."""

    value: float | None = None
    error: float | None = None


class Spread(_Record):
    """How KL is spread over tokens: quantiles by their share, and counts between `edges` of nats per token."""

    quantiles: dict[str, float] = Field(default_factory=dict)
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class QualityRecord(_Record):
    """What `eval` measured of one checkpoint of the lineage on one text."""

    step: str = Field(description="id of the lineage's step that made the checkpoint")
    against: str = Field(default="", description="the checkpoint that it was compared with; empty for none")
    data: str = Field(description="name of the file of texts")
    data_sha256: str
    tokens: int
    length: int
    scored: int
    protocol: str
    device: str = "cpu"
    source_perplexity: Number = Number()
    perplexity: Number = Number()
    kl: Number = Number()
    kl_median: Number = Number()
    kl_p99: Number = Number()
    top1: Number = Number()
    spread: Spread | None = None
    when: str = ""
    version: str = Field(default=__version__, description="of compress")

    @property
    def text(self) -> tuple[str, ...]:
        """What was measured on what: a later record of the same replaces it."""
        return (self.step, self.against, self.data_sha256, str(self.tokens), str(self.length))


class TaskRecord(_Record):
    """What an evaluation harness found on one task."""

    task: str
    metric: str
    value: float
    error: float | None = None
    dataset: str = Field(default="", description="id of the task's dataset on the Hub; empty for local files")
    dataset_revision: str = ""
    config: str = Field(default="", description="the dataset's configuration")
    split: str = ""
    shots: int = 0
    samples: int = 0
    complete: bool = Field(default=True, description="whether every sample of the split was asked")
    harness: str = Field(default="", description="name and version")
    when: str = ""


class Evaluation(_Record):
    """The content of `evaluation.json`."""

    schema_version: Literal[1] = 1
    fingerprint: str
    quality: tuple[QualityRecord, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()


def now() -> str:
    """The date and time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def verification(directory: Path, fingerprint: str) -> Verification | None:
    """What was verified of the bytes that `fingerprint` means; None if nothing was. Raises InputError for another file."""
    found = _read(directory / VERIFICATION, Verification)
    return found if isinstance(found, Verification) and found.fingerprint == fingerprint else None


def verified_by(directory: Path) -> tuple[str, ...]:
    """The readers that compute what the artifact there means; none where a record is missing, damaged or of other bytes."""
    manifest = Manifest.read(directory)
    found = _former(verification, directory, manifest.fingerprint) if manifest is not None else None
    return tuple(sorted(found.passed)) if found is not None else ()


def evaluation(directory: Path, fingerprint: str) -> Evaluation | None:
    """What was measured of the bytes that `fingerprint` means; None if nothing was. Raises InputError for another file."""
    found = _read(directory / EVALUATION, Evaluation)
    return found if isinstance(found, Evaluation) and found.fingerprint == fingerprint else None


def keep_reader(directory: Path, fingerprint: str, reader: str, record: ReaderRecord) -> Path:
    """Adds a reader to `verification.json`; returns its path. Raises MachineError where nothing can be written."""
    before = _former(verification, directory, fingerprint)
    readers = {**(before.readers if before is not None else {}), reader: record}
    return _write(directory / VERIFICATION, Verification(fingerprint=fingerprint, readers=dict(sorted(readers.items()))))


def keep_quality(directory: Path, fingerprint: str, records: list[QualityRecord]) -> Path:
    """Adds measurements on a text to `evaluation.json`; returns its path. Raises MachineError where nothing can be written."""
    before = _former(evaluation, directory, fingerprint) or Evaluation(fingerprint=fingerprint)
    kept = {record.text: record for record in (*before.quality, *records)}
    return _write(directory / EVALUATION, before.model_copy(update={"quality": tuple(kept.values())}))


def keep_tasks(directory: Path, fingerprint: str, records: list[TaskRecord]) -> Path:
    """Adds results of tasks to `evaluation.json`; returns its path. Raises MachineError where nothing can be written."""
    before = _former(evaluation, directory, fingerprint) or Evaluation(fingerprint=fingerprint)
    kept = {(record.task, record.metric, record.shots): record for record in (*before.tasks, *records)}
    return _write(directory / EVALUATION, before.model_copy(update={"tasks": tuple(kept.values())}))


def _former(read: Any, directory: Path, fingerprint: str) -> Any:
    """The record so far; None also for one that cannot be read, which is written anew."""
    with suppress(InputError):
        return read(directory, fingerprint)
    return None


def _read(path: Path, kind: type[Verification] | type[Evaluation]) -> Verification | Evaluation | None:
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        detail = str(error).splitlines()[0]
        do = "remove it, and run compress verify or compress eval again"
        raise InputError(str(path), "a record that this version can read", detail, do) from None


def _write(path: Path, record: Verification | Evaluation) -> Path:
    return write_text(path, record.model_dump_json(indent=1) + "\n")
