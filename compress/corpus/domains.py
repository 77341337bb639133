"""Domains: each source has samples to train on, and samples that are held out.

A source is split by its documents, so nothing of a held-out document is trained on. Held-out samples are drawn from a tenth of
the documents, taken by a shuffle that depends on the seed and the source alone; where these have too few tokens, from a fifth, or
from half. All others are trained on. Of ready inputs the rows are split.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.corpus.build import Corpus, SourceRecord, check_apart, check_length
from compress.corpus.documents import Documents, open_documents
from compress.corpus.encoder import Encoder, Sample
from compress.corpus.inputs import Inputs, check_alike, check_values
from compress.corpus.spec import DomainSpec, shuffled
from compress.errors import InputError

if TYPE_CHECKING:
    import torch

DOMAIN, HELD_OUT = "domain", "held_out"
"""Names of the tensors [samples] that say which source a sample is from, and whether it is held out."""
_SPLITS = (10, 5, 2)
"""The part of the documents that may be held out: one in so many."""


def build_domains(
    spec: DomainSpec, tokenizer_folder: Path, seed: int, *, vocabulary: int | None = None, positions: int | None = None,
    trusted: bool = False,
) -> Corpus:  # fmt: skip
    """Draws every domain: its held-out samples first. Arguments are those of `build_corpus`. Raises CompressError."""
    import torch

    check_length(spec, positions)
    parts: list[dict[str, torch.Tensor]] = []
    records: list[SourceRecord] = []
    if spec.ready:
        files = [Inputs(source) for source in spec.data]
        check_alike(files)
        check_apart([(file.name, file.sha256) for file in files])
        for number, file in enumerate(files):
            held = _held_rows(file, spec)
            order = list(islice(shuffled(file.count, f"{seed}/{file.sha256}"), held + spec.samples))
            rows = file.rows(order)
            check_values(rows, file.name, vocabulary, positions)
            parts.append(_marked(rows, number, held))
            records.append(SourceRecord(file.path.name, len(order), len(order), file.count, file.sha256))
    else:
        encoder = Encoder(spec, tokenizer_folder, trusted)
        with ExitStack() as stack:
            sources = [open_documents(source, spec.field, spec.split, spec.chat, stack) for source in spec.data]
            check_apart([(source.name, source.key) for source in sources])
            for number, source in enumerate(sources):
                kept, trained, used = _split(encoder, source, spec, seed)
                parts.append(_marked(encoder.tensors(kept + trained, vocabulary), number, len(kept)))
                facts = (source.sha256, source.revision, source.fingerprint)
                records.append(SourceRecord(source.label, len(kept + trained), used, source.count, *facts))
    return Corpus({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, tuple(records))


def domain_names(sources: Sequence[SourceRecord]) -> list[str]:
    """Names of domains: those of the sources, numbered where two are alike."""
    names = [source.name for source in sources]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _held_rows(file: Inputs, spec: DomainSpec) -> int:
    """How many rows of ready inputs are held out. Raises InputError if too few would be left."""
    ids = file.refs.get("input_ids")
    if ids is None or len(ids.shape) != 2:
        raise InputError(file.name, "input_ids [samples, tokens]", ", ".join(file.refs), "train on texts")
    held = -(-spec.held_out // ids.shape[1])
    if file.count <= held:
        expected = f"more than {held} samples: {held} of {ids.shape[1]} tokens are held out, for held_out={spec.held_out}"
        raise InputError(file.name, expected, str(file.count), "give more, or lower held_out")
    return held


def _split(encoder: Encoder, source: Documents, spec: DomainSpec, seed: int) -> tuple[list[Sample], list[Sample], int]:
    """(held-out samples, samples to train on, documents used) of a source. Raises InputError for one with too few texts."""
    if source.count < 2:
        do = "give it in more documents: a .txt file is cut every 64 KiB, a .jsonl file at each line"
        raise InputError(source.name, "at least two documents, one of them to hold out", "1", do)
    count = -(-spec.held_out // spec.length)
    kept: list[Sample] = []
    for split in _SPLITS:
        # A document has one token at least, so no more documents than tokens are needed.
        most = min(max(1, source.count // split), count * spec.length)
        numbers = list(islice(shuffled(source.count, f"{seed}/{source.key}/held out"), most))
        part = _Part(source, len(numbers), numbers.__getitem__)
        least = count if split == _SPLITS[-1] else 0
        try:
            kept, read = encoder.draw(part, count, f"{seed}/{source.key}/held out", least)
        except InputError as error:
            # The other messages are about single documents.
            if error.problems[0].where != source.name:
                raise
            found = error.problems[0]
            do = f"lower held_out, now {spec.held_out} tokens, or give more texts"
            raise InputError(source.name, f"{found.expected} in the half that may be held out", found.got, do) from None
        if len(kept) == count:
            break
    taken = sorted(numbers[number] for number in read)
    # How many of the documents that are left come before each that is taken.
    before = [number - i for i, number in enumerate(taken)]
    rest = _Part(source, source.count - len(taken), lambda number: number + bisect_right(before, number))
    rows, others = encoder.draw(rest, spec.samples, f"{seed}/{source.key}", 1)
    return kept, rows, len(taken) + len(others)


def _marked(tensors: dict[str, torch.Tensor], domain: int, held: int) -> dict[str, torch.Tensor]:
    """Samples with their domain, the first `held` of them marked as held out."""
    import torch

    count = len(next(iter(tensors.values())))
    marks = {DOMAIN: torch.full((count,), domain, dtype=torch.int32), HELD_OUT: torch.arange(count) < held}
    return {**tensors, **marks}


class _Part(Documents):
    """Some documents of a source, counted anew; `place` is a document's number in the source."""

    def __init__(self, source: Documents, count: int, place: Callable[[int], int]) -> None:
        self.source, self.count, self.place = source, count, place
        self.name, self.label, self.key = source.name, source.label, source.key

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        # A source may ask for several numbers before it gives the first document.
        asked: deque[int] = deque()

        def placed() -> Iterator[int]:
            for number in numbers:
                asked.append(number)
                yield self.place(number)

        for _, value in self.source.read(placed()):
            yield asked.popleft(), value

    def where(self, number: int) -> str:
        return self.source.where(self.place(number))
