"""GGUF keys: what metadata is called, there and in config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NUMBERS = (
    ("context_length", "u32", "max_position_embeddings"), ("embedding_length", "u32", "hidden_size"),
    ("block_count", "u32", "num_hidden_layers"), ("feed_forward_length", "u32", "intermediate_size"),
    ("attention.head_count", "u32", "num_attention_heads"), ("attention.head_count_kv", "u32", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "f32", "rms_norm_eps"), ("attention.key_length", "u32", "head_dim"),
    ("attention.value_length", "u32", "head_dim"), ("vocab_size", "u32", "vocab_size"),
    ("expert_count", "u32", "num_local_experts"), ("expert_count", "u32", "num_experts"),
    ("expert_used_count", "u32", "num_experts_per_tok"), ("expert_feed_forward_length", "u32", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "u32", "shared_expert_intermediate_size"),
    ("attn_logit_softcapping", "f32", "attn_logit_softcapping"), ("final_logit_softcapping", "f32", "final_logit_softcapping"),
    ("attention.sliding_window", "u32", "sliding_window"),
)  # fmt: skip
"""(key after the architecture, its type, the key of a config with the same number)."""
WINDOWED = ("gemma2", "gemma3", "gpt-oss")
"""Architectures that llama.cpp computes with a sliding window."""
MODELS = {
    "llama": ("llama", "LlamaForCausalLM"), "qwen2": ("qwen2", "Qwen2ForCausalLM"), "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"), "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"), "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"), "gpt-oss": ("gpt_oss", "GptOssForCausalLM"),
}  # fmt: skip
"""Architecture of a file -> model_type and class of transformers; a `llama` with experts is Mixtral."""

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+#|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*#|"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "dbrx": _WORDS + r"\p{N}{1,3}" + _REST,
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "gpt-4o": _CASED.replace("#", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + _SLASHED,
    "tekken": _CASED.replace("#", "") + r"\p{N}" + _SLASHED,
}
"""llama.cpp's name of the way in which text is split -> the regex. Llama 3 splits as DBRX does."""
WHOLE_WORDS = ("llama-bpe", "tekken")
"""Those that take a word that is a token whole, without merges."""
SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
"""Special tokens, as tokenizer_config.json and as GGUF calls them."""


def llama3_factors(rope: Mapping[str, Any], half: int) -> list[float]:
    """llama3's divisors of the `half` frequencies, which llama.cpp reads as `rope_freqs.weight`."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    found = []
    for i in range(half):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / half)
        smooth = min(1.0, max(0.0, (old / wave - low) / (high - low)))
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found
