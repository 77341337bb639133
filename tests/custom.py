"""A model whose classes lie in Python files of its own, as `save_pretrained` leaves one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from support import tiny_llama

CONFIGURATION = """
from transformers import LlamaConfig

RAN = {ran!r}
if RAN:
    open(RAN, "a").write("configuration\\n")


class TinyConfig(LlamaConfig):
    model_type = "tiny_custom"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_tiny import TinyConfig
from .helpers_tiny import LOUDER


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * LOUDER
        return output
"""
FILES = ("configuration_tiny.py", "helpers_tiny.py", "modeling_tiny.py")


def tiny_custom(directory: Path, tokenizer: Path | None = None, ran: str = "", **changes: Any) -> Path:
    """Saves a Llama whose logits are thrice as loud; loading its code leaves a line in the file `ran`."""
    if tokenizer is not None:
        sizes = json.loads((tokenizer / "config.json").read_text())
        changes |= {"vocab_size": sizes["vocab_size"]}
    tiny_llama(directory, **changes)
    config = json.loads((directory / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    config |= {"model_type": "tiny_custom", "architectures": ["TinyForCausalLM"], "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration_tiny.py").write_text(CONFIGURATION.format(ran=ran))
    (directory / "modeling_tiny.py").write_text(MODELING)
    (directory / "helpers_tiny.py").write_text("LOUDER = 3.0\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if tokenizer is not None:
            shutil.copyfile(tokenizer / file, directory / file)
    return directory
