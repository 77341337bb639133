"""Eval windows: an evaluation text as token ids, in windows of one length.

A file's documents are encoded one by one, without special tokens, and joined in order with nothing between them. Windows do
not overlap; tokens after the last full window are not used.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.corpus.documents import file_at, kind_word, not_text, open_documents
from compress.corpus.encoder import Encoder
from compress.corpus.spec import CorpusSpec, kind_of
from compress.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Checkpoint

FIELD = "text"
_DOCUMENTS = 16
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "tekken")


def check_data(data: str, length: int, limit: int | None = None) -> CorpusSpec:
    """Checks a text's name and sizes before a model is opened. Raises InputError for a missing file, UsageError."""
    spec = CorpusSpec((data,), field=FIELD, length=length, join="none", bos="never")
    if kind_of(data) not in ("lines", "text"):
        raise UsageError("data", "a .jsonl file with a field 'text', or a .txt", f"'{data}'", "convert it to one of them")
    if limit is not None and limit < length:
        raise UsageError("tokens", f"at least a window of {length}", f"{limit}", "raise tokens or lower length")
    file_at(data)
    return spec


def plain_tokenizer(folder: Path, trusted: bool = False) -> Any:
    """The tokenizer of a folder, for texts that get no special tokens. Raises InputError."""
    return Encoder(CorpusSpec(("-",), join="none", bos="never"), folder, trusted).tokenizer


def token_windows(
    tokenizer_folder: Path, data: Path | str, length: int, limit: int | None = None, trusted: bool = False
) -> torch.Tensor:
    """Token ids [windows, length] of the first `limit` tokens of a text, or of all. Raises InputError if it is too short."""
    import torch

    spec = check_data(str(data), length, limit)
    tokenizer = Encoder(spec, tokenizer_folder, trusted).tokenizer
    ids: list[int] = []
    with ExitStack() as stack:
        documents = open_documents(str(data), spec.field, spec.split, False, stack)
        rest = documents.read(range(documents.count))
        while (limit is None or len(ids) < limit) and (batch := list(islice(rest, _DOCUMENTS))):
            for number, text in batch:
                if not isinstance(text, str):
                    raise not_text(documents.where(number), spec.field, kind_word(text))
                if any("\ud800" <= c <= "\udfff" for c in text):
                    do = "repair the text or take it out"
                    raise InputError(documents.where(number), "a text of whole characters", "half of a surrogate pair", do)
            for found in tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]:
                ids += found
    wanted = limit or length
    if len(ids) < wanted:
        do = "give a longer text, or lower " + ("tokens" if limit and len(ids) >= length else "length")
        raise InputError(str(data), f"at least {wanted:,} tokens", f"{len(ids):,} tokens", do)
    count = min(len(ids), limit or len(ids)) // length
    return torch.tensor(ids[: count * length]).reshape(count, length)


def _tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files that define a tokenizer; if two models have the same ones, no tokenizer needs to be built."""
    return {f: (checkpoint.path / f).read_bytes() for f in checkpoint.side_files if f.startswith(_TOKENIZERS)}


def tokenizer_folder(source: Checkpoint | None, artifact: Checkpoint) -> Path:
    """The folder of the tokenizer: the source's, if it has one. Raises InputError if the artifact's differs."""
    owners = [c for c in (source, artifact) if c is not None and any(file.startswith(_TOKENIZERS) for file in c.side_files)]
    if len(owners) == 2 and _tokenizer_files(owners[0]) != _tokenizer_files(owners[1]):
        from compress.layerwise.logits import label_of

        ours, theirs = (plain_tokenizer(owner.path, owner.trusted).get_vocab() for owner in reversed(owners))
        if ours != theirs:
            expected = f"the tokenizer of {label_of(owners[0])}, of {len(theirs):,} tokens"
            got = f"one of {len(ours):,}" + (", some of them others" if len(ours) == len(theirs) else "")
            raise InputError(label_of(artifact), expected, got, "measure it against the model that it was made from")
    return (owners or [source or artifact])[0].path
