"""PEFT as a reader: an adapter on its base model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str]) -> Callable[[Any], Any]:
    """Ids [samples, length] -> logits [samples, length, vocabulary]. `artifact` is the adapter's folder."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    # By name: it is not there for whoever checks the types of this file.
    peft = importlib.import_module("peft")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True, trust_remote_code=False)
    model = peft.PeftModel.from_pretrained(model, artifact, local_files_only=True)
    model.eval()
    # It ignores tensors whose names it does not know, and leaves factors that it does not find as they were initialised.
    with safe_open(artifact / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    held = set(peft.get_peft_model_state_dict(model))
    if stored != held:
        missing, unread = sorted(held - stored), sorted(stored - held)
        raise ValueError(f"missing: {', '.join(missing)[:300] or 'nothing'}; not read: {', '.join(unread)[:300] or 'nothing'}")
    return lambda ids: model(input_ids=ids, use_cache=False).logits
