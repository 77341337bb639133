"""Hyperparameters of a GGUF file: what llama.cpp is told of a model.

llama.cpp computes an architecture in one way, so what a config says otherwise is refused by name: an activation, a kind of
rotation, a scale of attention. What it ignores beyond some length, such as a sliding window, is a counted note.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from compress.checkpoint.gguf_header import Entry
from compress.errors import Refusal
from compress.spec.gguf_keys import NUMBERS, WINDOWED, llama3_factors
from compress.spec.weight_state import Note

if TYPE_CHECKING:
    import torch

    from compress.importers.gguf_names import Architecture

_ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
_ELSEWHERE = "pack as compressed-tensors"
_GEMMA3_EVERY = 6
"""llama.cpp computes each sixth block of Gemma 3 with full attention."""


def full_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the defaults of its family filled in."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = {key: value for key, value in config.items() if key != "quantization_config"}
    found: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(content).to_dict()
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    if heads and hidden and not found.get("head_dim"):
        found["head_dim"] = hidden // heads
    if heads and not found.get("num_key_value_heads"):
        found["num_key_value_heads"] = heads
    return found


def entries(architecture: Architecture, config: dict[str, Any]) -> list[Entry]:
    """Everything but the tokenizer. Raises Refusal for what llama.cpp does not compute."""
    refuse(architecture, config)
    name = architecture.name
    found = {
        "general.architecture": Entry("general.architecture", "str", name),
        "general.type": Entry("general.type", "str", "model"),
    }
    for key, kind, source in NUMBERS:
        if isinstance(number := config.get(source), int | float) and not isinstance(number, bool):
            found[f"{name}.{key}"] = Entry(f"{name}.{key}", kind, number)
    for key, kind, value in _rotation(architecture, config):
        found[f"{name}.{key}"] = Entry(f"{name}.{key}", kind, value)
    if name == "gpt-oss":
        found[f"{name}.expert_feed_forward_length"] = Entry(
            f"{name}.expert_feed_forward_length", "u32", config["intermediate_size"]
        )
    if name not in WINDOWED:
        found.pop(f"{name}.attention.sliding_window", None)
    found["general.quantization_version"] = Entry("general.quantization_version", "u32", 2)
    return list(found.values())


def _ropes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotation of each kind of block; one kind is called full_attention."""
    rope = config.get("rope_parameters") or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    return {kind: value for kind, value in rope.items() if isinstance(value, dict)} if nested else {"full_attention": rope}


def _rotation(architecture: Architecture, config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    ropes = _ropes(config)
    rope, head = ropes.get("full_attention", {}), config["head_dim"]
    yield "rope.freq_base", "f32", float(rope.get("rope_theta", 10000.0))
    yield "rope.dimension_count", "u32", int(head * rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))
    if "sliding_attention" in ropes:
        yield "rope.freq_base_swa", "f32", float(ropes["sliding_attention"].get("rope_theta", 10000.0))
    if (kind := rope.get("rope_type", "default")) in ("linear", "yarn"):
        yield "rope.scaling.type", "str", kind
        yield "rope.scaling.factor", "f32", float(rope["factor"])
        if kind == "yarn":
            yield "rope.scaling.original_context_length", "u32", int(rope["original_max_position_embeddings"])


def refuse(architecture: Architecture, config: dict[str, Any]) -> None:
    """Raises Refusal for a config that llama.cpp would compute otherwise."""
    name = architecture.name
    wanted, got = _ACTIVATIONS.get(name, "silu"), config.get("hidden_act") or config.get("hidden_activation")
    got = config.get("hidden_activation") or got if name in _ACTIVATIONS else got
    if got != wanted:
        raise Refusal(f"llama.cpp computes {name} with {wanted}, not {got}", _ELSEWHERE)
    for rope in _ropes(config).values():
        kind = rope.get("rope_type", "default")
        known = {"default", "linear", "yarn", *(("llama3",) if name == "llama" else ())}
        if kind not in known:
            raise Refusal(f"rotation of the kind {kind}, which is not written for {name}", _ELSEWHERE)
    normed = {"qwen2moe": False, "qwen3moe": True}.get(name)
    if normed is not None and bool(config.get("norm_topk_prob")) != normed:
        word = "scaled to one" if normed else "left as they are"
        raise Refusal(f"llama.cpp computes {name} with the weights of experts {word}, the config says otherwise", _ELSEWHERE)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise Refusal(f"blocks without experts between blocks with them, which llama.cpp's {name} does not have", _ELSEWHERE)
    scale = config.get("query_pre_attn_scalar")
    if name in ("gemma2", "gemma3") and scale is not None and scale != config["head_dim"]:
        raise Refusal(f"attention scaled by {scale}, llama.cpp's {name} scales by the {config['head_dim']} of a head", _ELSEWHERE)
    kinds = config.get("layer_types") or []
    every = {"gemma2": 2, "gpt-oss": 2, "gemma3": _GEMMA3_EVERY}.get(name)
    if every and kinds != [("full" if (i + 1) % every == 0 else "sliding") + "_attention" for i in range(len(kinds))]:
        raise Refusal(f"llama.cpp's {name} has full attention in every block number {every}, this config in others", _ELSEWHERE)
    if name == "qwen2" and config.get("use_sliding_window"):
        raise Refusal("llama.cpp computes qwen2 without a sliding window", _ELSEWHERE)


def notes(architecture: Architecture, config: dict[str, Any]) -> list[Note]:
    """Counted lines about what llama.cpp leaves out."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    if (
        architecture.name in WINDOWED
        or not isinstance(window, int)
        or window >= longest
        or config.get("use_sliding_window") is False
    ):
        return []
    return [Note("window", f"llama.cpp attends beyond the {window} tokens of this model's sliding window", ("config.json",))]


def rope_factors(config: dict[str, Any]) -> torch.Tensor | None:
    """llama3's divisors of the frequencies, fp32 [rotated / 2], which llama.cpp reads as `rope_freqs.weight`."""
    import torch

    rope = _ropes(config).get("full_attention", {})
    if rope.get("rope_type") != "llama3":
        return None
    return torch.tensor(llama3_factors(rope, int(config["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2))
