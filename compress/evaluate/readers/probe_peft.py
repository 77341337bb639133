"""PEFT as a reader: an adapter on its base model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [samples, length] -> logits [samples, length, vocabulary]. `artifact` is the adapter's folder."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    # These keys would make it import a module, or open a pickle, that the config names.
    config = json.loads((artifact / "adapter_config.json").read_text())
    if named := [word for word in ("megatron_config", "corda_config", "lora_ga_config") if config.get(word)]:
        raise ValueError(f"adapter_config.json sets {', '.join(named)}, which an adapter is not read with here")
    # Checked before loading: without this file it would open a pickle.
    with safe_open(artifact / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    # Imported by name, because it is not installed where types are checked.
    peft = importlib.import_module("peft")
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, local_files_only=True, trust_remote_code=trusted, use_safetensors=True
    )
    model = peft.PeftModel.from_pretrained(model, artifact, local_files_only=True)
    model.eval()
    # It ignores tensors with unknown names, and leaves missing factors as they were initialised.
    held = set(peft.get_peft_model_state_dict(model))
    if stored != held:
        missing, unread = sorted(held - stored), sorted(stored - held)
        raise ValueError(f"missing: {', '.join(missing)[:300] or 'nothing'}; not read: {', '.join(unread)[:300] or 'nothing'}")
    return lambda ids: model(input_ids=ids, use_cache=False).logits
