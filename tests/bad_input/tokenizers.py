"""Tokenizers that are missing, broken, or another model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input.bench import Case

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
ARGV = "calibrate {model} {out} --data {work}/data.jsonl --samples 2 --length 16"
_CHAT = [{"role": "user", "content": "hello"}]


def with_data(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """Texts to calibrate on, which are sound, beside a tokenizer that is not."""

    def both(model: Path) -> None:
        (model.parent / "data.jsonl").write_text(
            "".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 9, "chat": _CHAT}) + "\n" for i in range(9))
        )
        spoil(model)

    return both


def change(file: str, **values: Any) -> Callable[[Path], object]:
    """Other values of some keys of a JSON file."""
    return lambda model: (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **values}))


def larger(model: Path) -> None:
    """Every id is one that the model has no row for."""
    content = json.loads((model / FILE).read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: number + 100_000 for word, number in vocabulary.items()}
    (model / FILE).write_text(json.dumps(content))


def none(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _case(said: tuple[str, ...], spoil: Callable[[Path], object], argv: str = ARGV, status: int = 3) -> Case:
    return Case(status, said, argv, with_data(spoil), "demo")


LOADS = "a tokenizer that transformers can load"
CASES = {
    "missing": _case(("tokenizer.json, with tokenizer_config.json", "no file of a tokenizer", "copy the tokenizer's files there"), none),
    "no JSON": _case((LOADS, "copy its files again"), lambda m: (m / FILE).write_text("<html>")),
    "empty": _case((LOADS,), lambda m: (m / FILE).write_bytes(b"")),
    "cut": _case((LOADS,), lambda m: (m / FILE).write_bytes((m / FILE).read_bytes()[:500])),
    "an unknown kind": _case((LOADS,), change(FILE, model={"type": "Evil"})),
    "ids beyond the vocabulary": _case(("ids below", "the size of the model's vocabulary", "use the tokenizer that belongs to the model"), larger),
    "a vocabulary that is a list": _case((LOADS,), change(FILE, model={"type": "BPE", "vocab": [1, 2], "merges": []})),
    "code of its own": _case((LOADS,), change(CONFIG, tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]})),
    "a config that is a list": _case((LOADS,), lambda m: (m / CONFIG).write_text("[]")),
    "a config that is no JSON": _case((LOADS,), lambda m: (m / CONFIG).write_text("{")),
    "no chat template": _case(("a tokenizer with a chat template", "set chat=false"), lambda m: None, f"{ARGV} --chat --field chat", 2),
    "a chat template that raises": _case(("a conversation that the chat template takes", "no such role"), change(CONFIG, chat_template="{{ raise_exception('no such role') }}"), f"{ARGV} --chat --field chat"),
    "a chat template that is no template": _case(("a conversation that the chat template takes",), change(CONFIG, chat_template="{% if %}"), f"{ARGV} --chat --field chat"),
    "a chat template that reaches out": _case(("a conversation that the chat template takes",), change(CONFIG, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"), f"{ARGV} --chat --field chat"),
    "no BOS": _case(("a tokenizer that has BOS", "set bos to auto"), change(CONFIG, bos_token=None), f"{ARGV} --bos always", 2),
    "longer than the model's positions": _case(("at most 512", "the positions of the model"), lambda m: None, ARGV.replace("16", "100000"), 2),
}  # fmt: skip
