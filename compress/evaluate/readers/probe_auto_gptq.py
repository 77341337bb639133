"""AutoGPTQ 0.7.1 as a reader: from_quantized, with plain torch on the CPU.

It needs transformers 4.46, which misreads a config.json of transformers 5: it gets a folder of links to the artifact's files
with a translated config.json.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [samples, length] -> logits [samples, length, vocabulary]."""
    copy = scratch / "artifact"
    copy.mkdir()
    for file in artifact.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file.absolute())
    stored = stored_names(artifact)
    config = json.loads((artifact / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(translated(config, stored, notes)))

    # Imported by name, because it is not installed where types are checked.
    auto_gptq = importlib.import_module("auto_gptq")
    wrapped = auto_gptq.AutoGPTQForCausalLM.from_quantized(
        str(copy), device="cpu", use_triton=False, inject_fused_attention=False, inject_fused_mlp=False, disable_exllama=True,
        disable_exllamav2=True, torch_dtype=dtype, use_safetensors=True, trust_remote_code=trusted, local_files_only=True,
    )  # fmt: skip
    model = wrapped.model.eval()
    complete(model, stored, notes)
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def translated(config: dict[str, Any], stored: set[str], notes: list[str]) -> dict[str, Any]:
    """A config.json of transformers 5 translated for 4.46; each change is a note."""
    new = dict(config)

    def say(change: str) -> None:
        notes.append(f"config.json for transformers 4.46: {change}")

    if "dtype" in new:
        new.setdefault("torch_dtype", new.pop("dtype"))
        say("dtype is torch_dtype")
    rope = new.get("rope_parameters")
    if isinstance(rope, dict):
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError("rope_parameters differ from layer to layer, which transformers 4.46 cannot say")
        del new["rope_parameters"]
        rest = dict(rope)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rest:
                new[name] = rest.pop(name)
                say(f"rope_parameters.{name} is {name}")
        if rest.get("rope_type", "default") != "default":
            new["rope_scaling"] = rest
            say("the rest of rope_parameters is rope_scaling")
    if "tie_word_embeddings" not in new:
        # The default of tie_word_embeddings has changed between versions; the stored tensors tell.
        new["tie_word_embeddings"] = not any(name.startswith(("lm_head.", "embed_out.")) for name in stored)
        say(f"tie_word_embeddings is {str(new['tie_word_embeddings']).lower()}")
    return new


def stored_names(artifact: Path) -> set[str]:
    """The names of all tensors of the artifact."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in artifact.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def complete(model: Any, stored: set[str], notes: list[str]) -> None:
    """Raises ValueError for missing tensors, which the reader silently leaves as they were initialised."""
    held = dict(model.state_dict(keep_vars=True))
    found = {id(value) for name, value in held.items() if name in stored}
    missing = sorted(name for name, value in held.items() if name not in stored and id(value) not in found)
    # Tensors that it computes itself if they are not stored.
    missing = [name for name in missing if not name.endswith((".g_idx", ".inv_freq", ".attn.bias", ".masked_bias"))]
    # It gives every quantized linear a bias of zeros, which stays if the artifact has none.
    packed = {name.removesuffix(".qweight") for name in held if name.endswith(".qweight")}
    missing = [n for n in missing if not (n.endswith(".bias") and n.removesuffix(".bias") in packed and not held[n].any())]
    if missing:
        raise ValueError(f"the model takes {len(missing)} tensors that the artifact does not have: {', '.join(missing)[:500]}")
    if unread := sorted(name for name in stored - set(held) if not name.endswith(".inv_freq")):
        notes.append(f"it does not read: {', '.join(unread)[:500]}")
