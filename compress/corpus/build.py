"""Build: a corpus is drawn from its sources, digested, saved and loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint.reader import size_of
from compress.corpus.documents import open_documents
from compress.corpus.encoder import Encoder
from compress.corpus.inputs import Inputs, check_alike, check_values
from compress.corpus.spec import CorpusSpec, shuffled
from compress.errors import InputError, MachineError, UsageError

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint

_KEY = "corpus"


@dataclass(frozen=True)
class SourceRecord:
    """What was drawn from a source, for the manifest: without paths of this machine."""

    name: str
    samples: int
    documents: int
    """Documents that went into the samples; rows of ready inputs."""
    total: int
    """Documents in the source."""
    sha256: str | None = None
    """sha256 of a file's content; for a .gz of the unpacked content."""
    revision: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Model inputs, samples along the first dimension: `input_ids` and `attention_mask`, with the packing `documents` also
    `position_ids`; or what a ready file has."""

    tensors: dict[str, torch.Tensor]
    sources: tuple[SourceRecord, ...] = ()

    @property
    def samples(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @cached_property
    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes."""
        import torch

        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes one safetensors file, the same bytes for the same corpus. Raises MachineError."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        # One key of metadata only: safetensors does not keep the order of several.
        record = json.dumps({"digest": self.digest, "sources": [asdict(source) for source in self.sources]})
        try:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path, {_KEY: record})
        except (OSError, SafetensorError) as error:
            do = "free some space, or give it a place that it may write to"
            raise MachineError(str(path), "a place to write", str(error), do) from None

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Reads what `save` wrote. Raises InputError for damage, unequal first dimensions, NaN, Inf or other bytes."""
        from safetensors import safe_open

        tensors = Inputs(str(path)).rows()
        check_values(tensors, str(path))
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        try:
            facts = json.loads(metadata[_KEY])
            corpus = cls(tensors, tuple(SourceRecord(**source) for source in facts["sources"]))
            digest = facts["digest"]
        except (KeyError, TypeError, ValueError, RecursionError):
            do = "to use ready inputs, name them as a source; else make the corpus anew"
            raise InputError(str(path), "a corpus, with a record of its sources", "no such record", do) from None
        if corpus.digest != digest:
            raise InputError(str(path), f"tensors of digest {digest}", f"{corpus.digest}: it was altered", "make it anew")
        return corpus


def build_corpus(
    spec: CorpusSpec, tokenizer_folder: Path, seed: int, *, vocabulary: int | None = None, positions: int | None = None,
    trusted: bool = False,
) -> Corpus:  # fmt: skip
    """Draws the corpus; `vocabulary` and `positions` are the model's limits on ids and on length. Raises CompressError."""
    import torch

    check_length(spec, positions)
    parts: list[dict[str, torch.Tensor]] = []
    records: list[SourceRecord] = []
    if spec.ready:
        files = [Inputs(source) for source in spec.data]
        check_alike(files)
        for file, count in zip(files, spec.shares, strict=True):
            if file.count < count:
                do = f"give more, or lower samples: it has {file.count}"
                raise InputError(file.name, f"{count} samples", str(file.count), do)
        check_apart([(file.name, file.sha256) for file in files])
        for file, count in zip(files, spec.shares, strict=True):
            parts.append(file.rows(islice(shuffled(file.count, f"{seed}/{file.sha256}"), count)))
            check_values(parts[-1], file.name, vocabulary, positions)
            records.append(SourceRecord(file.path.name, count, count, file.count, file.sha256))
    else:
        encoder = Encoder(spec, tokenizer_folder, trusted)
        with ExitStack() as stack:
            sources = [open_documents(source, spec.field, spec.split, spec.chat, stack) for source in spec.data]
            check_apart([(source.name, source.key) for source in sources])
            for source, count in zip(sources, spec.shares, strict=True):
                rows, used = encoder.draw(source, count, f"{seed}/{source.key}")
                parts.append(encoder.tensors(rows, vocabulary))
                facts = (source.sha256, source.revision, source.fingerprint)
                records.append(SourceRecord(source.label, count, len(used), source.count, *facts))
    order = list(shuffled(spec.samples, f"{seed}/order"))
    return Corpus({name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}, tuple(records))


def build_for(spec: CorpusSpec, model: Checkpoint, seed: int, build: Callable[..., Corpus] = build_corpus) -> Corpus:
    """`build_corpus`, or another, with the tokenizer of a model, within the limits of its config.json."""
    vocabulary, positions = size_of(model.config, "vocab_size"), size_of(model.config, "max_position_embeddings")
    return build(spec, model.path, seed, vocabulary=vocabulary, positions=positions, trusted=model.trusted)


def check_length(spec: CorpusSpec, positions: int | None) -> None:
    """Raises UsageError for samples that are longer than the model has positions."""
    if not spec.ready and positions is not None and spec.length > positions:
        do = f"set length to {positions} or less"
        raise UsageError("length", f"at most {positions}, the positions of the model", str(spec.length), do)


def check_apart(sources: list[tuple[str, str]]) -> None:
    """Raises InputError for two sources with the same content, which would give the same samples twice."""
    seen: dict[str, str] = {}
    for name, key in sources:
        if key in seen:
            raise InputError(name, "texts of its own", f"those of {seen[key]}", "name them once; weights take more of a source")
        seen[key] = name
