"""Families: the model types that mlx-lm has, and those that it was run on."""

from __future__ import annotations

VERSION = "0.32.2"
"""The version of mlx-lm that was run, and whose sources were read for the names."""
RUN = frozenset({
    "cohere", "deepseek_v3", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mamba2", "mistral", "mixtral", "olmo2",
    "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "stablelm",
})  # fmt: skip
"""Types of which a small model was packed, loaded and compared with what its codes mean."""
STACKING = frozenset({
    "afmoe", "bailing_moe", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "glm4_moe",
    "glm4_moe_lite", "kimi_k2", "mixtral", "olmoe", "phimoe", "qwen2_moe",
})  # fmt: skip
"""Types whose loader stacks the codes of experts as it does plain weights."""
LEAVING_OUT = {
    "deepseek_v3": r"model\.layers\.61",
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "glm4_moe", "glm4_moe_lite"), r"model\.layers\."),
    **dict.fromkeys(("exaone_moe", "nemotron_h", "qwen3_5", "qwen3_5_moe", "qwen3_next"), r"mtp\."),
}
"""Types whose loader leaves layers that predict further tokens out, by the start of their names; others stop at them."""
KNOWN = frozenset({
    "Klear", "afm7", "afmoe", "apertus", "baichuan_m1", "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "bitnet",
    "cohere", "cohere2", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone", "exaone4", "exaone_moe", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n",
    "gemma4", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan", "hunyuan_v1_dense", "internlm2",
    "internlm3", "iquestcoder", "jamba", "kimi_k2", "kimi_k25", "kimi_linear", "kimi_vl", "lfm2", "lfm2-vl", "lfm2_moe",
    "llama", "llama4", "llama4_text", "llava", "longcat_flash", "mamba", "mamba2", "mimo", "mimo_v2_flash", "minicpm",
    "minicpm3", "minimax", "minimax_m2", "ministral3", "mistral", "mistral3", "mistral4", "mixtral", "nanochat", "nemotron",
    "nemotron-nas", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openelm", "phi", "phi-msft", "phi3",
    "phi3small", "phimoe", "pixtral", "plamo", "plamo2", "qwen", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3",
    "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "recurrent_gemma", "rwkv7", "seed_oss",
    "smollm3", "solar_open", "stablelm", "starcoder2", "step3p5", "xverse", "youtu_llm",
})  # fmt: skip
"""Types that it builds a model of."""
