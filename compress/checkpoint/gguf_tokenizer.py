"""GGUF tokenizer: the tokenizer.json that a GGUF file's metadata means.

With it go its config and the chat template.
"""

from __future__ import annotations

import json
from typing import Any

from compress.errors import InputError
from compress.spec.gguf_keys import BYTE, CONTROL, RULES, SPECIAL, UNKNOWN, USER, WHOLE_WORDS

_KINDS = ("gpt2", "llama")
_ALIKE = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "smaug-bpe": "dbrx",
    "default": "gpt-2", "llama4": "gpt-4o",
}  # fmt: skip
"""Other names of the same rule."""
_SPACE = "\u2581"


def tokenizer_texts(metadata: dict[str, Any], file: str) -> dict[str, str]:
    """Texts by the names of files; none for a file without a vocabulary, or with one of another kind. Raises InputError."""

    def listed(key: str, kind: type, length: int | None = None) -> list[Any]:
        found = metadata.get(f"tokenizer.ggml.{key}")
        right = isinstance(found, list) and all(type(one) is kind for one in found) and len(found) == (length or len(found))
        if not right:
            do = "start from the model that the file was made from"
            raise InputError(file, f"tokenizer.ggml.{key}, a list of {length or 'some'} {kind.__name__}", "something else", do)
        assert isinstance(found, list)
        return found

    if metadata.get("tokenizer.ggml.model") not in _KINDS:
        return {}
    tokens = listed("tokens", str)
    types = listed("token_type", int, len(tokens)) if "tokenizer.ggml.token_type" in metadata else [1] * len(tokens)
    pieces = metadata["tokenizer.ggml.model"] == "llama"
    if pieces:
        tokens = [t.replace(" ", _SPACE) if kind == USER else t for t, kind in zip(tokens, types, strict=True)]
        merges = _merges(tokens, listed("scores", float, len(tokens)))
    else:
        merges = listed("merges", str)
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocabulary.setdefault(token, i)
    added = [
        {
            "id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind != USER,
        }
        for i, (t, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER)
    ]  # fmt: skip
    special = {word: _token(metadata, key, tokens) for word, key in SPECIAL}
    fallback = pieces and BYTE in types
    rule = _ALIKE.get(name := str(metadata.get("tokenizer.ggml.pre", "default")), name)
    model = {
        "type": "BPE", "dropout": None, "unk_token": special["unk"] if pieces else None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": pieces, "byte_fallback": fallback, "ignore_merges": rule in WHOLE_WORDS,
        "vocab": vocabulary, "merges": merges,
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        **(_sentencepiece(metadata) if pieces else _byte_level(rule)), "post_processor": _around(metadata, special, vocabulary),
        "model": model,
    }  # fmt: skip
    config: dict[str, Any] = {f"{word}_token": token for word, token in special.items() if token is not None}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    texts = {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
    }
    template = metadata.get("tokenizer.chat_template")
    return texts | ({"chat_template.jinja": template} if isinstance(template, str) else {})


def _token(metadata: dict[str, Any], key: str, tokens: list[str]) -> str | None:
    id_ = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return tokens[id_] if isinstance(id_, int) and 0 <= id_ < len(tokens) else None


def _merges(tokens: list[str], scores: list[float]) -> list[str | list[str]]:
    """The pairs of tokens that make a token, the highest score first: what SentencePiece does without a list of them."""
    known = set(tokens)
    pairs = [
        (-score, len(left), [left, token[len(left) :]])
        for token, score in zip(tokens, scores, strict=True)
        for left in (token[:i] for i in range(1, len(token)))
        if left in known and token[len(left) :] in known
    ]
    return [pair for _, _, pair in sorted(pairs, key=lambda found: found[:2])]


def _byte_level(rule: str) -> dict[str, Any]:
    """How byte-level BPE splits a text and joins it again."""
    plain = rule not in RULES
    parts: list[dict[str, Any]] = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": plain}]
    if rule == "smollm":
        parts.insert(0, {"type": "Digits", "individual_digits": True})
    elif not plain:
        parts.insert(0, {"type": "Split", "pattern": {"Regex": RULES[rule]}, "behavior": "Isolated", "invert": False})
    before = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    after = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"normalizer": None, "pre_tokenizer": before, "decoder": after}


def _sentencepiece(metadata: dict[str, Any]) -> dict[str, Any]:
    """How SentencePiece marks spaces, and takes the marks away again."""
    first = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    marks: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if first else []
    marks.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": marks}, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
    }  # fmt: skip


def _around(metadata: dict[str, Any], special: dict[str, str | None], vocabulary: dict[str, int]) -> dict[str, Any] | None:
    """The tokens that are put before and after a text; SentencePiece's kind has the first one unless the file says otherwise."""
    pieces = metadata["tokenizer.ggml.model"] == "llama"
    first = special["bos"] if metadata.get("tokenizer.ggml.add_bos_token", pieces) else None
    last = special["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return None
    put = {token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]} for token in (first, last) if token is not None}

    def text(name: str) -> list[dict[str, Any]]:
        inner: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": 0}}]
        before = [{"SpecialToken": {"id": first, "type_id": 0}}] if first is not None else []
        return [*before, *inner, *([{"SpecialToken": {"id": last, "type_id": 0}}] if last is not None else [])]

    return {"type": "TemplateProcessing", "single": text("A"), "pair": [*text("A"), *text("B")], "special_tokens": put}
