"""transformers as a reader: AutoModelForCausalLM, from the files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [samples, length] -> logits [samples, length, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        artifact, dtype=dtype, local_files_only=True, trust_remote_code=trusted, use_safetensors=True, output_loading_info=True
    )
    # It fills missing tensors with random numbers, and says so only in its log.
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, report[kind])))[:500]}")
    if report.get("unexpected_keys"):
        if any(name.endswith((".k_scale", ".v_scale")) for name in report["unexpected_keys"]):
            notes.append("it does not read the scales of keys and values, and keeps them unrounded")
        notes.append(f"it does not read: {', '.join(sorted(report['unexpected_keys']))[:500]}")
    model.eval()
    return lambda ids: model(input_ids=ids, use_cache=False).logits
