"""Manifest: how a checkpoint came to be; a checkpoint explains itself.

`manifest.json` lies beside the shards. Everything but `measured` (timings, peak memory, ranks, the
date) is part of the fingerprint, so that the same input, recipe, seed, threads,
instruction set and GPU give the same manifest, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.errors import InputError, UsageError
from compress.spec.kept import Kept
from compress.spec.weight_state import DTYPE_BYTES, State

FILE = "manifest.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_MOST = 1 << 48
"""Largest number of rows or columns of a weight."""


class WeightRecord(_Model):
    """State, size and errors of one weight that a pass has changed."""

    state: str
    dtype: str = Field(description="safetensors dtype of the dense weight")
    shape: tuple[int, ...] = Field(description="stored shape of the dense weight")
    transposed: bool = False
    bits: float = Field(description="bits per weight as stored, scales and padding included")
    error: float | None = Field(None, description="|W - W'| / |W|, Frobenius")
    output_error: float | None = Field(None, description="|(W - W') x| / |W x| over the calibration tokens")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        try:
            scheme = State.parse(self.state).scheme
        except UsageError as error:
            raise ValueError(str(error)) from None
        sizes = all(0 <= size <= _MOST for size in self.shape) and (scheme is None or len(self.shape) in (2, 3))
        if self.dtype not in DTYPE_BYTES or not sizes:
            raise ValueError(f"no weight is {self.state} of {self.dtype} {list(self.shape)}")
        return self


class NoteRecord(_Model):
    """A counted line: skips, ragged groups, untouched towers, unused tensors."""

    what: str
    reason: str
    count: int
    names: tuple[str, ...]


class Step(_Model):
    """One pass of the lineage."""

    id: str = Field(description="hash of parent, options, revision, seed and inputs")
    parent: str = Field(description="fingerprint of the checkpoint that this step read")
    text: str
    options: dict[str, Any]
    revision: int
    inputs: dict[str, str] = Field(default_factory=dict, description="digests of what this step read besides its parent")


class Source(_Model):
    """Where the first checkpoint came from. `name` is a Hub id or a directory's last part."""

    name: str
    commit: str | None = None
    licence: str | None = None
    licence_name: str | None = Field(default=None, description="of a licence that the Hub has no id for")
    licence_link: str | None = None
    datasets: tuple[str, ...] = ()
    fingerprint: str

    def licence_fields(self) -> dict[str, str]:
        """The licence as a card's metadata says it."""
        details = {"license_name": self.licence_name, "license_link": self.licence_link}
        other = self.licence_name is not None and self.licence in ("other", self.licence_name)
        named = {"license": "other" if other else self.licence, **details} if self.licence else details
        return {key: text for key, text in named.items() if text}


class Manifest(_Model):
    """The content of `manifest.json`."""

    schema_version: Literal[1] = 1
    compress_version: str
    fingerprint: str = ""
    parent: str = Field(description="fingerprint of the checkpoint this one was made from")
    source: Source
    lineage: tuple[Step, ...] = Field(min_length=1)
    seed: int
    threads: int
    isa: str
    device: str = Field("", description="GPU that a calibrated pass has computed on; empty where that was the CPU")
    format: str = Field(description="'canonical', or the packed format")
    coverage: dict[str, int] = Field(description="targeted, transformed and skipped weights of the last pass")
    weights: dict[str, WeightRecord]
    notes: tuple[NoteRecord, ...] = ()
    structure: dict[str, Any] = Field(
        default_factory=dict, description="what was kept of the source: layers, channels, heads, neurons; empty for all of it"
    )
    digests: dict[str, str] = Field(description="sha256 of each stored tensor's bytes")
    files: dict[str, str] = Field(description="sha256 of every other file; see scan.text_digest")
    measured: dict[str, Any] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _in_directory(cls, files: dict[str, str]) -> dict[str, str]:
        # The files of an adapter lie in a folder of their own.
        plain = re.compile(r"(?:[^/]+/)?[^/]+")
        if odd := [name for name in files if not plain.fullmatch(name) or {".", ".."} & {*name.split("/")}]:
            raise ValueError(f"{odd[0]!a} is no file beside it")
        return files

    @field_validator("coverage")
    @classmethod
    def _counted(cls, coverage: dict[str, int]) -> dict[str, int]:
        if not {"targeted", "transformed", "skipped"} <= coverage.keys():
            raise ValueError("coverage tells of targeted, transformed and skipped")
        return coverage

    @field_validator("structure")
    @classmethod
    def _readable(cls, structure: dict[str, Any]) -> dict[str, Any]:
        if structure:
            Kept.from_json(structure)
        return structure

    @property
    def kept(self) -> Kept | None:
        """What was kept of the lineage's source; None for all of it."""
        return Kept.from_json(self.structure) if self.structure else None

    def sealed(self) -> Manifest:
        """The same manifest with its fingerprint filled in."""
        return self.model_copy(update={"fingerprint": self.compute_fingerprint()})

    def compute_fingerprint(self) -> str:
        return hash_json(self._content("fingerprint", "measured"))

    def to_text(self) -> str:
        return json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n"

    def _content(self, *without: str) -> dict[str, Any]:
        # What says nothing is left out, as in manifests from before it could be said.
        silent: dict[str, Any] = {name: True for name in ("device", "structure") if not getattr(self, name)}
        silent["source"] = {name for name in ("licence_name", "licence_link") if not getattr(self.source, name)}
        return self.model_dump(mode="json", exclude={**silent, **dict.fromkeys(without, True)})

    @staticmethod
    def is_ours(path: Path) -> bool:
        """Whether a `manifest.json` is one of compress; other tools use the name too."""
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and {"compress_version", "lineage"} <= content.keys()

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest of `directory`, None if it has none of ours. Raises InputError if it was altered."""
        path = directory / FILE
        if not path.is_file():
            return None
        if not cls.is_ours(path):
            return None
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except (ValidationError, UnicodeDecodeError) as error:
            detail = str(error).splitlines()[0]
            raise InputError(str(path), "a manifest that this version can read", detail, "make it anew") from None
        if manifest.compute_fingerprint() != manifest.fingerprint:
            raise InputError(
                str(path), "a manifest that matches its fingerprint", "one that was edited", "make the checkpoint anew"
            )
        return manifest


def hash_json(content: Any) -> str:
    """sha256 of the canonical JSON text of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content_fingerprint(digests: dict[str, str], files: dict[str, str]) -> str:
    """The identity of a checkpoint without a manifest: a hash over its tensors and side files, whatever the sharding."""
    return hash_json({"tensors": digests, "files": files})
