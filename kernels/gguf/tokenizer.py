"""Tokenizer of a GGUF file: what tokenizer.json, and the files beside it, become.

llama.cpp knows two kinds that its decoders use: byte-level BPE (`gpt2`), with the name of the rule by which text is split first,
and SentencePiece (`llama`), with a score for each token. The name is found by the rule itself in tokenizer.json, not by the
model's name; scores follow from the order of merges.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress.checkpoint.gguf_header import Entry
from compress.checkpoint.reader import read_json
from compress.errors import Refusal
from compress.spec.gguf_keys import BYTE, CONTROL, NORMAL, RULES, SPECIAL, UNKNOWN, UNUSED, USER, WHOLE_WORDS
from compress.spec.weight_state import Note

_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_entries(folder: Path, config: dict[str, Any]) -> tuple[list[Entry], list[Note]]:
    """The keys of the tokenizer in a folder, and counted lines. Raises Refusal for one that llama.cpp does not have."""
    if not (folder / "tokenizer.json").is_file():
        reason = "no tokenizer.json, so the file has no vocabulary and is run on token ids only"
        return [Entry("tokenizer.ggml.model", "str", "none")], [Note("tokenizer", reason, ("tokenizer.json",))]
    content, said = (read_json(folder / name) if (folder / name).is_file() else {} for name in _FILES)
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise Refusal(
            f"a tokenizer of the type {model.get('type')}: BPE is written here, byte-level or SentencePiece's",
            "pack as compressed-tensors",
        )
    tokens, types = _tokens(content, model, int(config["vocab_size"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    notes: list[Note] = []
    if model.get("byte_fallback"):
        entries = [
            Entry("tokenizer.ggml.model", "str", "llama"), Entry("tokenizer.ggml.pre", "str", "default"),
            Entry("tokenizer.ggml.scores", "f32", _scores(tokens, merges)),
            Entry("tokenizer.ggml.add_space_prefix", "bool", _prefixed(content)),
        ]  # fmt: skip
    else:
        pre, known = _rule(content, model)
        entries = [
            Entry("tokenizer.ggml.model", "str", "gpt2"), Entry("tokenizer.ggml.pre", "str", pre),
            Entry("tokenizer.ggml.merges", "str", merges),
        ]  # fmt: skip
        if not known:
            reason = "llama.cpp has no name here for the way in which this tokenizer splits text; `default` may split otherwise"
            notes.append(Note("tokenizer", reason, ("tokenizer.json",)))
    entries += [Entry("tokenizer.ggml.tokens", "str", tokens), Entry("tokenizer.ggml.token_type", "i32", types)]
    entries += _special(content, said, config, tokens)
    if template := _template(folder, said):
        entries.append(Entry("tokenizer.chat_template", "str", template))
    return entries, notes


def _tokens(content: dict[str, Any], model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, and their types; ids of the embedding that no token has are unused."""
    found: dict[int, tuple[str, int]] = {id_: (text, NORMAL) for text, id_ in model["vocab"].items()}
    if model.get("byte_fallback"):
        found |= {i: (text, BYTE) for i, (text, _) in found.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", text)}
    for added in content.get("added_tokens") or []:
        unknown = added["content"] == model.get("unk_token")
        kind, text = UNKNOWN if unknown else CONTROL if added.get("special") else USER, added["content"]
        # In SentencePiece's kind llama.cpp looks these up in the text itself, where spaces are spaces.
        found[added["id"]] = (text.replace("\u2581", " ") if kind == USER and model.get("byte_fallback") else text, kind)
    if beyond := [i for i in found if i >= size]:
        do = "resize the embedding, or take these tokens out of tokenizer.json"
        raise Refusal(f"the tokenizer has {len(beyond)} tokens beyond the {size} of the embedding", do)
    rows = [found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A score for each token: the earlier its merge, the higher; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(merges) + i)) for i, token in enumerate(tokens)]


def _prefixed(content: dict[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    parts = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    parts += [inner for part in parts for inner in (*part.get("normalizers", ()), *part.get("pretokenizers", ()))]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _rule(content: dict[str, Any], model: dict[str, Any]) -> tuple[str, bool]:
    """(llama.cpp's name of the rule by which text is split, whether it is known)."""
    before = content.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers") or [before]
    regexes = [
        part["pattern"].get("Regex") for part in parts if part.get("type") == "Split" and isinstance(part.get("pattern"), dict)
    ]
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"]:
        whole = bool(model.get("ignore_merges"))
        for name, regex in RULES.items():
            if regex == regexes[0] and whole == (name in WHOLE_WORDS):
                return name, True
    plain = [
        part
        for part in parts
        if part.get("type") == "ByteLevel" and part.get("use_regex", True) and not part.get("add_prefix_space")
    ]
    if kinds == ["ByteLevel"] and plain:
        return "gpt-2", True
    if kinds == ["Digits", "ByteLevel"] and plain and parts[0].get("individual_digits"):
        return "smollm", True
    return "default", False


def _special(content: dict[str, Any], said: dict[str, Any], config: dict[str, Any], tokens: list[str]) -> list[Entry]:
    """Ids of special tokens, and which of them are put around a text."""
    entries, ids = [], {text: i for i, text in reversed(list(enumerate(tokens)))}
    for name, there in SPECIAL:
        token = said.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        known = config.get(f"{name}_token_id")
        known = known[0] if isinstance(known, list) and known else known
        id_ = ids.get(token, known) if isinstance(token, str) else known
        if isinstance(id_, int) and 0 <= id_ < len(tokens):
            entries.append(Entry(f"tokenizer.ggml.{there}_token_id", "u32", id_))
    after = content.get("post_processor") or {}
    around = [step for part in (after, *after.get("processors", ())) for step in part.get("single", ())]
    kinds = ["SpecialToken" in step for step in around]
    for name, put in (("bos", kinds[:1] == [True]), ("eos", kinds[1:] != [] and kinds[-1])):
        told = said.get(f"add_{name}_token")
        entries.append(Entry(f"tokenizer.ggml.add_{name}_token", "bool", told if isinstance(told, bool) else put))
    return entries


def _template(folder: Path, said: dict[str, Any]) -> str:
    """The chat template; empty where there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = said.get("chat_template")
    if isinstance(found, list):
        found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None)
    return found if isinstance(found, str) else ""
