"""Tiny models of many families, from transformers' own configs: random weights, fixed seed, bf16, two blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from support import ready_inputs

VOCABULARY, HIDDEN, INTERMEDIATE, BLOCKS, EXPERTS = 128, 64, 96, 2, 4
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
_ROUTED: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """One tiny model: its config, and how many weights of its blocks a human counts as linear."""

    model_type: str
    linears: int
    """Two-dimensional linears on disk, each expert counted, or each fused stack of experts as one."""
    config: dict[str, Any] = field(default_factory=dict)
    """What its config says besides, or instead of, `_SIZES`."""
    cls: str = ""
    """transformers' class; the causal language model of the type where empty."""
    left: int = 0
    """How many of the linears are left alone by default; architecture/left_alone.py."""


FAMILIES: dict[str, Family] = {
    # dense decoders
    "llama": Family("llama", 2 * 7),
    "tied": Family("llama", 2 * 7, {"tie_word_embeddings": True}),
    "mistral": Family("mistral", 2 * 7),
    "head_dim": Family("mistral", 2 * 7, {"head_dim": 32}),
    "qwen2": Family("qwen2", 2 * 7),
    "qwen3": Family("qwen3", 2 * 7, {"head_dim": 16}),
    "gemma2": Family("gemma2", 2 * 7, {"head_dim": 16}),
    "gemma3": Family("gemma3_text", 2 * 7, {"head_dim": 16}),
    "phi3": Family("phi3", 2 * 4),
    "gpt2": Family("gpt2", 2 * 4),
    "gpt_neox": Family("gpt_neox", 2 * 4),
    "opt": Family("opt", 2 * 6, {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN}),
    "bloom": Family("bloom", 2 * 4),
    "falcon": Family("falcon", 2 * 4),
    "starcoder2": Family("starcoder2", 2 * 6),
    "cohere": Family("cohere", 2 * 7),
    "olmo2": Family("olmo2", 2 * 7),
    "stablelm": Family("stablelm", 2 * 7),
    "glm4": Family("glm4", 2 * 6, {"head_dim": 16}),
    "granite": Family("granite", 2 * 7),
    # state spaces and linear attention; mamba2's config.json has an infinity, olmo_hybrid's convolutions are fused on load
    "mamba2": Family("mamba2", 2 * 2, {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "olmo_hybrid": Family(
        "olmo_hybrid", 3 * (7 + 3) + (4 + 3),
        {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4,
         "linear_num_value_heads": 4},
        left=3 * 2,
    ),
    # experts, one tensor each on disk
    "mixtral": Family("mixtral", 2 * (4 + 3 * EXPERTS), {"num_local_experts": EXPERTS}),
    "qwen2_moe": Family("qwen2_moe", 2 * (4 + 3 * EXPERTS + 3), {**_ROUTED, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": Family("qwen3_moe", 2 * (4 + 3 * EXPERTS), {**_ROUTED, "head_dim": 16}),
    "olmoe": Family("olmoe", 2 * (4 + 3 * EXPERTS), _ROUTED),
    # block 0 is dense, blocks 1 and 2 have routed and shared experts
    "deepseek_v3": Family(
        "deepseek_v3", (5 + 3) + 2 * (5 + 3 * EXPERTS + 3),
        {
            "num_hidden_layers": 3,
            "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
            "v_head_dim": 16, "num_key_value_heads": 4, "num_mtp_layers": 0,
        },
    ),
    # experts fused into one tensor on disk
    "gpt_oss": Family("gpt_oss", 2 * (4 + 2), {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16}),
    "llama4": Family(
        "llama4_text", 2 * (4 + 2 + 3),
        {"num_local_experts": EXPERTS, "head_dim": 16, "intermediate_size_mlp": INTERMEDIATE},
        "Llama4ForCausalLM",
    ),
    "granitemoe": Family("granitemoe", 2 * (4 + 2), {"num_local_experts": EXPERTS}),
    # other stacks than one decoder; gte's qkv and gate_up are split on load
    "gte": Family("gte", 2 * 4, cls="GteForMaskedLM"),
    "bert": Family("bert", 2 * 6, cls="BertForMaskedLM"),
    "t5": Family(
        "t5", 2 * 6 + 2 * 10,
        {"d_model": HIDDEN, "d_ff": INTERMEDIATE, "d_kv": 16, "num_layers": BLOCKS, "num_heads": 4, "decoder_start_token_id": 0},
        "T5ForConditionalGeneration",
    ),
    "whisper": Family(
        "whisper", 2 * 6 + 2 * 10,
        {
            "d_model": HIDDEN, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": INTERMEDIATE, "decoder_ffn_dim": INTERMEDIATE,
            "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "decoder_start_token_id": 1,
        },
        "WhisperForConditionalGeneration",
    ),
    "llava": Family(
        "llava", 2 * 7,
        {"text_config": {"model_type": "llama", **_SIZES}, "vision_config": _VISION, "image_token_id": 0},
        "LlavaForConditionalGeneration",
    ),
}  # fmt: skip


_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
_KIMI: dict[str, Any] = {
    "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "num_mtp_layers": 0,
}  # fmt: skip
_INDEXED: dict[str, Any] = {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 8}
_PATCHES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN, "patch_size": 8,
    "num_position_embeddings": 16,
}  # fmt: skip
_M_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
RECENT: dict[str, Family] = {
    # linear attention, whose gates are left alone, beside full attention
    "qwen3_next": Family(
        "qwen3_next", 3 * 3 + 4 + 4 * (3 * EXPERTS + 3), {**_ROUTED, **_DELTA, "shared_expert_intermediate_size": 64}, left=3
    ),
    "qwen3_5": Family("qwen3_5_text", 3 * 5 + 4 + 4 * 3, _DELTA, left=3 * 2),
    "qwen3_5_moe": Family(
        "qwen3_5_moe_text", 3 * 5 + 4 + 4 * (3 * EXPERTS + 3), {**_ROUTED, **_DELTA, "shared_expert_intermediate_size": 64},
        left=3 * 2,
    ),
    "kimi_linear": Family(
        "kimi_linear", 4 * 9 + 5 + 3 + 4 * (3 * EXPERTS + 3),
        {**_KIMI, "num_hidden_layers": 5, "linear_head_dim": 16, "linear_num_heads": 4}, left=4 * 3,
    ),
    # attention to tokens that an indexer chooses; compressed keys and mixed residual streams
    "deepseek_v32": Family(
        "deepseek_v32", 3 * (5 + 3) + 3 + 2 * (3 * EXPERTS + 3), {**_KIMI, **_INDEXED, "num_hidden_layers": 3}, left=3
    ),
    "glm_moe_dsa": Family(
        "glm_moe_dsa", 3 * (5 + 3) + 3 + 2 * (3 * EXPERTS + 3), {**_KIMI, **_INDEXED, "num_hidden_layers": 3}, left=3
    ),
    "deepseek_v4": Family(
        "deepseek_v4", 3 * 5 + (2 + 4) + 2 + 3 * (3 * EXPERTS + 3),
        {
            **_INDEXED, "num_hidden_layers": 3, "num_key_value_heads": 1, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "head_dim": 32, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 32, "sliding_window": 8,
            "hc_mult": 2, "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        },
        left=3 + (2 + 3) + 2,
    ),
    "glm5_next": Family(
        "glm5_next", 3 * 9 + (5 + 3) + 3 * 3 + 3 * EXPERTS + 3,
        {
            "text_config": {
                "model_type": "glm5_next_text", **_SIZES, **_KIMI, **_INDEXED, "num_hidden_layers": 4, "qk_rope_head_dim": 0, "n_group": 1,
                "topk_group": 1, "linear_head_dim": 16, "linear_num_heads": 4, "index_kpool": 4, "hc_mult": 2,
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN, "image_size": 16,
                "patch_size": 8, "projection_intermediate_size": 64,
            },
            "image_token_id": 0, "video_token_id": 0,
        },
        "Glm5NextForConditionalGeneration", left=3 * 3 + 1,
    ),
    # experts as before
    "glm4_moe": Family(
        "glm4_moe", (4 + 3) + 4 + 3 * EXPERTS + 3,
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "num_mtp_layers": 0},
    ),
    # a text model beside towers
    "gemma3_vl": Family(
        "gemma3", 2 * 7,
        {
            "text_config": {"model_type": "gemma3_text", **_SIZES, "head_dim": 16}, "mm_tokens_per_image": 4,
            "vision_config": {"model_type": "siglip_vision_model", **_PATCHES}, "image_token_index": 0,
        },
        "Gemma3ForConditionalGeneration",
    ),
    "gemma4": Family(
        "gemma4", 2 * 9,
        {
            "text_config": {
                "model_type": "gemma4_text", **_SIZES, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 32,
                "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
            },
            "vision_config": {"model_type": "gemma4_vision", **_PATCHES, "num_key_value_heads": 2, "head_dim": 16}, "image_token_id": 0,
            "audio_config": None,
        },
        "Gemma4ForConditionalGeneration",
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl", 2 * 7,
        {
            "text_config": {"model_type": "qwen2_5_vl_text", **_SIZES, "rope_parameters": _M_ROPE},
            "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 32}, "image_token_id": 0, "video_token_id": 0,
            "vision_start_token_id": 0, "vision_end_token_id": 0,
        },
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": Family(
        "qwen3_vl", 2 * 7,
        {
            "text_config": {"model_type": "qwen3_vl_text", **_SIZES, "head_dim": 16, "rope_parameters": _M_ROPE},
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]}, "image_token_id": 0, "video_token_id": 0,
            "vision_start_token_id": 0, "vision_end_token_id": 0,
        },
        "Qwen3VLForConditionalGeneration",
    ),
    "qwen3_5_vl": Family(
        "qwen3_5", 3 * 5 + 4 + 4 * 3,
        {
            "text_config": {"model_type": "qwen3_5_text", **_SIZES, **_DELTA}, "vision_config": _QWEN_VISION, "image_token_id": 0,
            "video_token_id": 0, "vision_start_token_id": 0, "vision_end_token_id": 0,
        },
        "Qwen3_5ForConditionalGeneration", left=3 * 2,
    ),
    "mistral3": Family(
        "mistral3", 2 * 7,
        {
            "text_config": {"model_type": "mistral", **_SIZES, "head_dim": 16},
            "vision_config": {"model_type": "pixtral", **_PATCHES, "head_dim": 16}, "image_token_index": 0,
        },
        "Mistral3ForConditionalGeneration",
    ),
    "llama4_vl": Family(
        "llama4", 2 * (4 + 2 + 3),
        {
            "text_config": {
                "model_type": "llama4_text", **_SIZES, "num_local_experts": EXPERTS, "head_dim": 16, "intermediate_size_mlp": INTERMEDIATE,
            },
            "vision_config": {
                "model_type": "llama4_vision_model", **_PATCHES, "vision_output_dim": HIDDEN, "projector_input_dim": 32,
                "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5,
            },
            "image_token_index": 0,
        },
        "Llama4ForConditionalGeneration",
    ),
    "kimi_k25": Family(
        "kimi_k25", (5 + 3) + 5 + 3 * EXPERTS + 3,
        {
            "text_config": {"model_type": "deepseek_v3", **_SIZES, **_KIMI},
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
            },
            "image_token_id": 0,
        },
        "Kimi_K25ForConditionalGeneration",
    ),
}  # fmt: skip
"""Families of 2025 and 2026 that the slower tests of all families leave out: linear and sparse attention, towers."""

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("tied", {}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("head_dim", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window": 16}),
    "phi3": ("phi3", {}),
    "gpt_oss": ("gpt_oss", {}),
}
"""Every architecture that is written for llama.cpp: a family, with what llama.cpp asks of its config."""


_SERVED: dict[str, Any] = {"hidden_size": 2 * HIDDEN, "intermediate_size": 256, "head_dim": 32}
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SERVED),
    "qwen3": ("qwen3", _SERVED),
    "mixtral": ("mixtral", _SERVED),
    "gemma3": ("gemma3", {**GGUF["gemma3"][1], **_SERVED}),
}
"""What every engine's kernels take: heads of 32 for vLLM's attention, columns that groups of 128 divide."""


def build_gguf(name: str, directory: Path) -> Path:
    """Saves a tiny model that llama.cpp computes; returns its directory."""
    return _build_as(f"gguf {name}", *GGUF[name], directory)


def build_served(name: str, directory: Path) -> Path:
    """Saves a tiny model that vLLM, llama.cpp and mlx-lm compute; returns its directory."""
    return _build_as(f"served {name}", *SERVED[name], directory)


def _build_as(name: str, base: str, more: dict[str, Any], directory: Path) -> Path:
    FAMILIES[name] = replace(FAMILIES[base], config={**FAMILIES[base].config, **more})
    try:
        return build(name, directory)
    finally:
        del FAMILIES[name]


def build(name: str, directory: Path) -> Path:
    """Saves the model of a family under `directory`; returns its directory.

    Every parameter is random, norms and biases included: one that got lost would show in the logits.
    """
    family = (FAMILIES | RECENT)[name]
    sizes = {} if "text_config" in family.config else _SIZES
    config = transformers.AutoConfig.for_model(family.model_type, **{**sizes, **family.config})
    cls = getattr(transformers, family.cls) if family.cls else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)  # vectors that a family draws, and that are kept below, do not depend on what was drawn before
        model = cls(config) if family.cls else cls.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) / 8
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.to(torch.bfloat16).save_pretrained(directory / name)
    return directory / name


def inputs_for(name: str, folder: Path, samples: int = 5) -> Path:
    """Ready inputs for a family: token ids, or audio features with the decoder's ids."""
    if name != "whisper":
        return ready_inputs(samples)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, 8, 32, generator=generator)
    ids = torch.randint(3, 128, (samples, 24), generator=generator)
    save_file({"input_features": features, "decoder_input_ids": ids}, folder / "audio.safetensors")
    return folder / "audio.safetensors"
