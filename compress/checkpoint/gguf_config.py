"""GGUF config: the config.json that a GGUF file's metadata means."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from compress.checkpoint.gguf_header import GgufHeader
from compress.errors import InputError
from compress.spec.gguf_keys import MODELS, NUMBERS, WINDOWED, llama3_factors

_NEEDED = (
    "max_position_embeddings", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps",
)  # fmt: skip
_FACTORS = "rope_freqs.weight"
_LARGEST_GEMMAS = {("gemma2", 46), ("gemma3", 62)}
"""(architecture, blocks) of those whose attention is scaled by the hidden size over the heads."""
_OTHERWISE = "start from the model that the file was made from"


def config_of(header: GgufHeader, file: str, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """config.json for a file. Raises InputError for an architecture that is not known here, and for keys that are missing."""

    def bad(expected: str, got: str, do: str = _OTHERWISE) -> InputError:
        return InputError(file, expected, got, do)

    metadata, names = header.metadata, {ref.name for ref in header.refs}
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODELS:
        raise bad(f"an architecture among {', '.join(MODELS)}", f"'{architecture}'")
    kind, cls = MODELS[architecture]
    if architecture == "llama" and metadata.get("llama.expert_count"):
        kind, cls = "mixtral", "MixtralForCausalLM"
    config: dict[str, Any] = {"architectures": [cls], "model_type": kind}
    for key, form, here in NUMBERS:
        number = metadata.get(f"{architecture}.{key}")
        right = isinstance(number, int) and not isinstance(number, bool) if form == "u32" else _finite(number)
        if number is not None and not right:
            raise bad(f"one number for {architecture}.{key}", type(number).__name__)
        if number is not None and here not in config:
            # A float of a file has the seven digits that it was written with.
            config[here] = float(f"{number:.7g}") if isinstance(number, float) else number
    if missing := [key for key in _NEEDED if key not in config]:
        raise bad(f"the keys of {architecture}", f"none for {', '.join(missing)}")
    if architecture not in WINDOWED:
        config.pop("sliding_window", None)
    config.pop("num_local_experts" if kind not in ("mixtral", "gpt_oss") else "num_experts", None)
    if kind == "gpt_oss":
        config.pop("moe_intermediate_size", None)
    embedding = next((ref for ref in header.refs if ref.name == "token_embd.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise bad("a matrix token_embd.weight", "none")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in names
    head = _head(metadata, architecture, config, bad)
    config |= _rotation(header, read, architecture, head, bad)
    config |= _family(architecture, config, head, names)
    for word, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{word}_token_id"] = token if isinstance(token, int) else None
    return {**config, "dtype": _dtype(header)}


def _head(metadata: dict[str, Any], architecture: str, config: dict[str, Any], bad: Callable[[str, str], InputError]) -> int:
    """The width of a head."""
    known = config.get("head_dim") or (metadata.get("llama.rope.dimension_count") if architecture == "llama" else None)
    if known is None and config["num_attention_heads"]:
        known = config["hidden_size"] // config["num_attention_heads"]
    if not isinstance(known, int) or not 0 < known < 1 << 16:
        raise bad("heads of a width", f"{known}")
    return known


def _finite(number: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < math.inf


def _rotation(
    header: GgufHeader, read: Callable[[int, int], bytes], architecture: str, head: int, bad: Callable[[str, str], InputError]
) -> dict[str, Any]:
    """How positions are rotated."""

    def number(key: str, default: float) -> Any:
        found = header.metadata.get(f"{architecture}.rope.{key}", default)
        if not _finite(found) or found <= 0:
            raise bad(f"a number for {architecture}.rope.{key}", type(found).__name__)
        return found

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(number("freq_base", 10000.0))}
    kind = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(number("scaling.factor", 1.0))}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = number("scaling.original_context_length", 0)
    elif kind != "none" or any(ref.name.startswith("rope_factors") for ref in header.refs):
        raise bad("no rotation but linear, yarn and llama3", f"'{kind}' with factors of its own")
    if (ref := next((ref for ref in header.refs if ref.name == _FACTORS), None)) is not None:
        rope |= _llama3(struct.unpack(f"<{ref.nbytes // 4}f", read(ref.offset, ref.nbytes)), rope, bad)
    found: dict[str, Any] = {"rope_parameters": rope}
    rotated = number("dimension_count", head)
    if architecture == "phi3" and rotated != head:
        rope["partial_rotary_factor"] = rotated / head
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(number("freq_base_swa", 10000.0))}
        found = {"rope_parameters": {"sliding_attention": local, "full_attention": rope}}
    return found


def _llama3(factors: tuple[float, ...], rope: dict[str, Any], bad: Callable[[str, str], InputError]) -> dict[str, Any]:
    """The settings of llama3's rotation that give these factors; the released models have one of a few."""
    for factor in (8.0, 32.0, 16.0, 4.0):
        for old in (8192, 32):
            terms = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": old}
            made = llama3_factors({**rope, **terms}, len(factors))
            if all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(factors, made, strict=True)):
                return {"rope_type": "llama3", **terms}
    raise bad(f"{_FACTORS} of a Llama 3", "other factors")


def _family(architecture: str, config: dict[str, Any], head: int, names: set[str]) -> dict[str, Any]:
    """What the architecture implies, or the presence of tensors tells."""
    found: dict[str, Any] = {}
    if architecture in ("llama", "qwen3", "qwen3moe", "gemma2", "gemma3", "gpt-oss"):
        found["head_dim"] = head
    if architecture == "llama" and config["model_type"] == "llama":
        found |= {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_gate.bias" in names}
    if architecture.startswith("gemma"):
        larger = (architecture, config["num_hidden_layers"]) in _LARGEST_GEMMAS
        found["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if larger else head
    if architecture == "qwen3moe":
        found["norm_topk_prob"] = True
    return found


def _dtype(header: GgufHeader) -> str:
    """The dtype that dense weights get: that of the matrices, or fp16, which scales of blocks have."""
    kinds = {ref.kind for ref in header.refs if len(ref.shape) > 1}
    plain = {"F32": "float32", "BF16": "bfloat16"}
    return plain[kinds.pop()] if len(kinds) == 1 and kinds <= plain.keys() else "float16"
