"""An empty cache, a directory with nothing in it, and variants of the demo's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from corpus.oracle import BOS, EOS, TEMPLATE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of datasets, and a working directory with nothing in it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def tokenizers(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo tokenizer as it is, and variants: adding BOS, or BOS and EOS, ending with EOS, with a chat template, without EOS."""
    found = {"plain": demo_model}

    def variant(name: str, config: dict[str, Any], post: list[str] | None = None, added: Sequence[Any] = ()) -> None:
        folder = found[name] = tmp_path_factory.mktemp(name)
        content = json.loads((demo_model / "tokenizer.json").read_text())
        content["added_tokens"] += added
        if post:
            ids = {"<s>": BOS, "</s>": EOS}
            single = [
                {"SpecialToken": {"id": t, "type_id": 0}} if t in ids else {"Sequence": {"id": "A", "type_id": 0}} for t in post
            ]
            pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
            special = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in ids.items()}
            content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        settings = json.loads((demo_model / "tokenizer_config.json").read_text()) | config
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    variant("bos", {}, ["<s>", "A"])
    variant("both", {}, ["<s>", "A", "</s>"])
    variant("two", {}, ["<s>", "</s>", "A"])
    variant("chat", {"chat_template": TEMPLATE})
    variant("bare", {"bos_token": None, "eos_token": None})
    added = {
        "id": 1024,
        "content": "<pad>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    variant("pad", {"pad_token": "<pad>"}, None, [added])
    parts = "{% for p in messages[0].content %}{% if 'image' in p %}IMAGE{% endif %}{{ p.text }}{% endfor %}"
    variant("parts", {"chat_template": parts})
    variant("picky", {"chat_template": "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"})
    return found
