"""Spec: the sources of a corpus, each one's share of samples, the order of draws."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePath
from typing import Literal, get_args

from compress.errors import Problem, UsageError

Kind = Literal["lines", "text", "parquet", "ready", "stdin", "dataset"]
Packing = Literal["concatenate", "pad", "documents"]
Join = Literal["auto", "eos", "none"]
Bos = Literal["auto", "always", "never"]
_ENDINGS: dict[str, Kind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".txt": "text", ".parquet": "parquet", ".safetensors": "ready",
}  # fmt: skip
_WANTED = "a .jsonl, .json, .txt (or one of them .gz), .parquet or .safetensors file, - for stdin, or hf:NAME"


def kind_of(source: str) -> Kind | None:
    """What a source is, by its name; None if the name does not say."""
    if source == "-":
        return "stdin"
    if source.startswith("hf:"):
        return "dataset"
    path = PurePath(source.lower())
    if path.suffix != ".gz":
        return _ENDINGS.get(path.suffix)
    kind = _ENDINGS.get(PurePath(path.stem).suffix)
    return kind if kind in ("lines", "text") else None


@dataclass(frozen=True)
class CorpusSpec:
    """What to draw; seed, tokenizer and the model's limits come with `build_corpus`. Raises UsageError with all problems."""

    data: tuple[str, ...]
    weights: tuple[float, ...] = ()
    """Share of the samples from each source, on any scale; none for equal shares."""
    field: str = "text"
    """The field of a record that holds its text, or, with `chat`, its list of {role, content}."""
    split: str = "train"
    samples: int = 128
    length: int = 2048
    packing: Packing = "concatenate"
    join: Join = "auto"
    """Between the documents of a stream: EOS, nothing, or (auto) EOS between texts where the tokenizer has one."""
    chat: bool = False
    bos: Bos = "auto"
    """At the start of a sample, or with `documents` of each document: BOS, none, or (auto) the prefix that the tokenizer or the
    chat template adds by itself."""

    def __post_init__(self) -> None:
        if problems := [*self._wrong_data(), *self._wrong_numbers()]:
            raise UsageError(problems)

    @property
    def ready(self) -> bool:
        """Whether the sources are ready model inputs, which need no tokenizer and fix the length."""
        return kind_of(self.data[0]) == "ready"

    @property
    def shares(self) -> list[int]:
        """Samples of each source."""
        return shares(self.samples, self.weights or (1.0,) * len(self.data))

    def _wrong_data(self) -> Iterator[Problem]:
        kinds = [kind_of(source) for source in self.data]
        if not self.data:
            yield Problem("data", "at least one source", "none", f"name {_WANTED}")
        for source, kind in zip(self.data, kinds, strict=True):
            if kind != "dataset" and "://" in source:  # not quoted: it may carry a credential
                yield Problem("data", _WANTED, "a URL", "download the file, or write hf:NAME for a dataset of the Hub")
            elif not kind:
                ending = PurePath(source).suffix
                got = f"'{source}', which ends in {ending}" if ending else f"'{source}', which has no ending"
                yield Problem("data", _WANTED, got, "rename or convert the file; before a dataset's name write hf:")
            elif kind == "dataset" and not split_name(source)[0]:
                yield Problem("data", "hf:NAME, hf:NAME:CONFIG or hf:NAME@REVISION", f"'{source}'", "name the dataset")
        if twice := {source for source in self.data if self.data.count(source) > 1}:
            yield Problem("data", "each source once", f"'{min(twice)}' twice", "use weights to take more of one source")
        if 0 < kinds.count("ready") < len(kinds):
            yield Problem("data", "texts, or ready inputs in .safetensors", "both", "calibrate on one of the two")
        if not self.field:
            yield Problem("field", "the name of a field", "an empty text", "leave it out for 'text'")

    def _wrong_numbers(self) -> Iterator[Problem]:
        for name, known in (("packing", Packing), ("join", Join), ("bos", Bos)):
            if (word := getattr(self, name)) not in get_args(known):
                yield Problem(name, f"one of {', '.join(get_args(known))}", f"'{word}'", "choose one of them")
        for name, value, least in (("samples", self.samples, 1), ("length", self.length, 2)):
            if value < least:
                yield Problem(name, f"at least {least}", str(value), "128 samples of 2048 tokens are usual")
        if self.weights and len(self.weights) != len(self.data):
            got = f"{len(self.weights)} for {len(self.data)} sources"
            yield Problem("weights", "one for each source of data", got, "give as many, or none for equal shares")
        elif odd := [weight for weight in self.weights if not (weight > 0 and math.isfinite(weight))]:
            yield Problem("weights", "finite numbers above 0", str(odd[0]), "to take nothing of a source, leave it out of data")
        elif self.data and self.samples >= 1:
            for source in [source for source, count in zip(self.data, self.shares, strict=True) if not count][:1]:
                got = f"none of {self.samples} from '{source}'"
                yield Problem("samples", "at least one from each source", got, "raise samples or its weight, or leave it out")


@dataclass(frozen=True)
class DomainSpec(CorpusSpec):
    """Sources that are domains: of each `samples`, or as many as it has, and held-out ones besides."""

    held_out: int = 1 << 14
    """Tokens of each source that are held out, rounded up to whole samples."""

    @property
    def shares(self) -> list[int]:
        return [self.samples] * len(self.data)


def split_name(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and revision of `hf:NAME:CONFIG@REVISION`."""
    whole, _, revision = source.removeprefix("hf:").partition("@")
    name, _, config = whole.partition(":")
    return name, config or None, revision or None


def shares(samples: int, weights: Sequence[float]) -> list[int]:
    """`samples` divided in proportion to `weights` by largest remainder, in exact arithmetic; ties go to the first."""
    exact = [Fraction(weight) for weight in weights]
    quotas = [samples * weight / sum(exact) for weight in exact]
    counts = [math.floor(quota) for quota in quotas]
    first = sorted(range(len(counts)), key=lambda i: (counts[i] - quotas[i], i))
    for i in first[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def shuffled(count: int, key: str) -> Iterator[int]:
    """0 ... count-1 in an order that depends on `key` only; memory grows with the numbers taken, not with `count`."""
    moved: dict[int, int] = {}
    for i in range(count):
        # 256 bits modulo a count: the bias is negligible.
        j = i + int.from_bytes(hashlib.sha256(f"{key}/{i}".encode()).digest(), "big") % (count - i)
        here = moved.pop(i, i)
        if j == i:
            yield here
        else:
            yield moved.get(j, j)
            moved[j] = here
