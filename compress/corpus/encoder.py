"""Encoder: documents of a source become samples of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.remote_code import references, would_run
from compress.corpus.documents import Documents, kind_word, not_text
from compress.corpus.spec import CorpusSpec, shuffled
from compress.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

Sample = list[list[int]]
"""The texts in a sample, each with its own positions; only the packing `documents` has more than one."""
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken")
_BATCH = 16
_SPAN = 16
"""Characters of a long document that are encoded per token needed; more than a token spans on average."""
_USUAL_SPAN = 4
"""Characters per token, roughly: a part of a document should be about as long as a sample."""
_MARGIN = 8
"""Tokens before a cut in the text that are dropped, because the cut may have changed them."""


class Encoder:
    """Makes samples as `spec` says, with a tokenizer. Raises InputError, UsageError.

    The folder's own Python files are run only if it is `trusted`.
    """

    def __init__(self, spec: CorpusSpec, folder: Path, trusted: bool = False) -> None:
        from transformers import AutoTokenizer

        self.spec, self.folder = spec, folder
        if not any(True for pattern in _FILES for _ in folder.glob(pattern)):
            do = "copy the tokenizer's files there from the model's source"
            raise InputError(str(folder), "tokenizer.json, with tokenizer_config.json", "no file of a tokenizer", do)
        if trusted:
            references(folder)  # raises for another repository's code
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        except Exception as error:  # the library and its parsers may raise anything for a broken file
            do = (not trusted and would_run(folder)) or "copy its files again"
            raise InputError(str(folder), "a tokenizer that transformers can load", _first_line(error), do) from None
        self.bos, self.eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if spec.chat and not self.tokenizer.chat_template:
            do = "set chat=false, or take a model that was tuned for conversations"
            raise UsageError("chat", "a tokenizer with a chat template", f"none in {folder}", do)
        if spec.bos == "always" and self.bos is None:
            raise UsageError("bos", "a tokenizer that has BOS", f"none in {folder}", "set bos to auto")
        if spec.join == "eos" and self.eos is None:
            raise UsageError("join", "a tokenizer that has EOS", f"none in {folder}", "set join to auto or none")
        self.joint: int | None = self.eos if spec.join == "eos" or (spec.join == "auto" and not spec.chat) else None
        self.prefix, self.suffix = self._affixes()
        if spec.length <= (own := len(self.prefix) + len(self.suffix)):
            got = f"{spec.length}, of which {own} are special tokens"
            raise UsageError("length", "room for tokens of a text", got, f"set length to more than {own}")

    def _affixes(self) -> tuple[list[int], list[int]]:
        """(tokens that begin a sample, tokens that end a padded one if the tokenizer ends texts by itself, as T5's does)."""
        if self.spec.bos == "always":
            return [self.bos], []
        if self.spec.bos == "never" or self.spec.chat:
            return [], []
        plain, whole = self._ids(["a"])[0], list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at], whole[at + len(plain) :] if self.spec.packing == "pad" else []

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def draw(self, source: Documents, count: int, key: str, least: int | None = None) -> tuple[list[Sample], set[int]]:
        """`count` samples of a source, not yet padded, and the documents that went into them.

        A source with fewer gives what it has, but at least `least`; without it, `count`. Raises InputError.
        """
        draw = self._one_each if self.spec.packing == "pad" else self._windows
        return draw(source, key, count, count if least is None else least)

    def _parts(self, source: Documents, key: str) -> Iterator[tuple[int, str]]:
        """(number, text) of parts about as long as a sample: one of each document, then another of each long one, and so on.

        Without that a few long documents would make up all samples.
        """
        size = self.spec.length * _USUAL_SPAN
        turn, more = 0, True
        while more:
            more = False
            for number, value in source.read(shuffled(source.count, key)):
                text = self._text(source, number, value)
                count = 1 if self.spec.chat else max(1, -(-len(text) // size))
                if turn < count:
                    part = next(islice(shuffled(count, f"{key}/{number}"), turn, None))
                    yield number, text if count == 1 else text[_word(text, part * size) : _word(text, (part + 1) * size)]
                more = more or turn + 1 < count
            turn += 1

    def _windows(self, source: Documents, key: str, count: int, least: int) -> tuple[list[Sample], set[int]]:
        length, apart = self.spec.length, self.spec.packing == "documents"
        texts, used = self._texts(source, key, count * length)
        prefix = self.prefix
        if self.spec.chat and self.spec.bos == "auto" and texts and texts[0][:1] == [self.bos]:
            prefix = [self.bos]
        if not apart:
            texts = [[*chain.from_iterable(texts)]]
        rows: list[Sample] = []
        i = at = 0
        while len(rows) < count:
            row: Sample = []
            room = length
            while room and i < len(texts):
                # The previous window may have ended within a prefix of several tokens.
                at = 0 if apart and not row and at < len(prefix) else at
                # A document that begins exactly here has its own prefix.
                lead = [] if row or texts[i][at : at + len(prefix)] == prefix else prefix
                body = texts[i][at : at + room - len(lead)]
                row.append(lead + body)
                room -= len(lead) + len(body)
                at += len(body)
                if at == len(texts[i]):
                    i, at = i + 1, 0
            if room and len(rows) >= least:
                break
            if room:
                do = f"give more texts, or lower samples or length: these make {len(rows)} samples"
                expected = f"{least * length} tokens for {least} samples of {length}"
                raise InputError(source.name, expected, f"{sum(map(len, texts))} tokens in {len(used)} documents", do)
            rows.append(row)
        return rows, used

    def _texts(self, source: Documents, key: str, need: int) -> tuple[list[list[int]], set[int]]:
        """Texts with at least `need` tokens in all, or as many as there are, and the documents that they are from.

        Each ends with the EOS that joins it to the next, and with the packing `documents` begins with the prefix.
        """
        texts: list[list[int]] = []
        taken: set[int] = set()
        size = 0
        parts = self._parts(source, key)
        while size < need and (batch := list(islice(parts, _BATCH))):
            for (number, _), ids in zip(batch, self._encode([text for _, text in batch], need - size), strict=True):
                if ids and size < need:
                    if self.joint is not None and texts and texts[-1][-1] != self.joint:
                        texts[-1].append(self.joint)
                        size += 1
                    own = self.spec.packing != "documents" or ids[: len(self.prefix)] == self.prefix
                    texts.append(ids if own else self.prefix + ids)
                    size += len(texts[-1])
                    taken.add(number)
        return texts, taken

    def _one_each(self, source: Documents, key: str, count: int, least: int) -> tuple[list[Sample], set[int]]:
        documents = source.read(shuffled(source.count, key))
        rows: list[Sample] = []
        taken: set[int] = set()
        while len(rows) < count and (batch := list(islice(documents, min(_BATCH, count - len(rows))))):
            texts = [self._text(source, number, value) for number, value in batch]
            for (number, _), ids in zip(batch, self._encode(texts, self.spec.length), strict=True):
                if ids:
                    lead = [] if ids[: len(self.prefix)] == self.prefix else self.prefix
                    rows.append([lead + ids[: self.spec.length - len(lead) - len(self.suffix)] + self.suffix])
                    taken.add(number)
        if len(rows) < least:
            got = f"{len(rows)} among {source.count}"
            do = "give more, lower samples, or set packing to concatenate"
            raise InputError(source.name, f"{least} documents with text", got, do)
        return rows, taken

    def _encode(self, texts: list[str], need: int) -> list[list[int]]:
        """The ids of each text, none for a blank one; of a text longer than `need` tokens at least that many."""
        limit = (need + _MARGIN) * _SPAN
        found = self._ids([text[:limit] for text in texts])
        for i, text in enumerate(texts):
            if len(text) > limit and len(found[i]) < need + _MARGIN:
                found[i] = self._ids([text])[0]
            if not text.strip():
                found[i] = []
            if self.spec.bos == "never" and found[i][:1] == [self.bos]:
                del found[i][0]
        return found

    def _text(self, source: Documents, number: int, value: Any) -> str:
        if self.spec.chat:
            value = self._conversation(source, number, value)
        elif not isinstance(value, str):
            raise not_text(source.where(number), self.spec.field, kind_word(value))
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            do = "repair the text or take it out"
            raise InputError(source.where(number), "a text of whole characters", "half of a surrogate pair", do)
        return str(value)

    def _conversation(self, source: Documents, number: int, value: Any) -> str:
        """The text that the chat template makes of a list of messages."""
        expected, do = f"'{self.spec.field}': a list of {{role, content}}", "set field to the conversation, or convert it"
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(source.where(number), expected, kind_word(value), do)
        if not value:
            raise InputError(source.where(number), expected, "an empty list", "take the record out")
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                got = f"a message of {', '.join(map(str, message))}" if isinstance(message, dict) else kind_word(message)
                raise InputError(source.where(number), expected, got, do)
        try:
            return str(self.tokenizer.apply_chat_template([_without_nulls(message) for message in value], tokenize=False))
        except Exception as error:  # a template may raise anything
            do = "repair the conversation or take it out"
            raise InputError(
                source.where(number), "a conversation that the chat template takes", _first_line(error), do
            ) from None

    def tensors(self, rows: list[Sample], vocabulary: int | None) -> dict[str, torch.Tensor]:
        """Ids and mask [samples, length], padded on the right; with the packing `documents` also positions, from 0 in each
        text. Raises InputError for an unknown id."""
        import torch

        if vocabulary is not None and (most := max(max(text) for row in rows for text in row)) >= vocabulary:
            got = f"id {most}, the token '{self.tokenizer.convert_ids_to_tokens(most)}'"
            do = "use the tokenizer that belongs to the model"
            raise InputError(str(self.folder), f"ids below {vocabulary}, the size of the model's vocabulary", got, do)
        fill = next((i for i in (self.tokenizer.pad_token_id, self.eos) if i is not None and i < (vocabulary or i + 1)), 0)
        ids = torch.full((len(rows), self.spec.length), fill, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            whole = [*chain.from_iterable(row)]
            ids[i, : len(whole)] = torch.tensor(whole)
            mask[i, : len(whole)] = True
        found = {"input_ids": ids, "attention_mask": mask}
        if self.spec.packing == "documents":
            found["position_ids"] = torch.stack([torch.cat([torch.arange(len(text)) for text in row]) for row in rows])
        return found


def _word(text: str, at: int) -> int:
    """The first index from `at` on where a word begins."""
    if at == 0:
        return 0
    while at < len(text) and not text[at - 1].isspace():
        at += 1
    return at


def _without_nulls(part: dict[str, Any]) -> dict[str, Any]:
    """A message, and parts of its content, without the nulls that parquet adds for fields of other messages."""
    inner = [_without_nulls(p) if isinstance(p, dict) else p for p in part.get("content") or ()]
    kept = {key: value for key, value in part.items() if value is not None}
    return {**kept, "content": inner} if isinstance(part.get("content"), list) else kept


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
