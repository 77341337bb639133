"""quantize.rotate: the function is kept, what cannot be rotated is refused by name, outliers are spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from compress.architecture.weight_map import resolve as resolve_names
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, CoverageError, InputError, RecipeError, UsageError
from compress.executors.rotate import Turning
from compress.layerwise import memory_estimate
from compress.pipeline.resolve import resolve
from compress.spec.recipe import parse_one_liner
from families import Family, build
from support import CALIBRATE, do, kl, load, logits, ready_inputs, run, step_of, stop_at_record, tiny_llama, tree

families.FAMILIES.setdefault("gemma", Family("gemma", 2 * 7, {"head_dim": 16}))
ROTATED = (
    "llama", "tied", "mistral", "head_dim", "qwen2", "qwen3", "granite", "gemma", "phi3", "mixtral", "qwen2_moe", "qwen3_moe",
    "olmoe", "gpt_oss",
)  # fmt: skip
VALUES_ALONE = ("gemma2", "gemma3", "gpt2", "opt")
"""Families whose residual stream cannot be rotated, but whose values can."""
NOT_KEPT = {
    "opt": "LayerNorm, which subtracts the mean of all channels",
    "gpt2": "LayerNorm, which subtracts the mean of all channels",
    "gpt_neox": "LayerNorm, which subtracts the mean of all channels",
    "stablelm": "LayerNorm, which subtracts the mean of all channels",
    "starcoder2": "LayerNorm, which subtracts the mean of all channels",
    "cohere": "CohereLayerNorm, which subtracts the mean of all channels",
    "gemma2": "post_attention_layernorm, whose gain is for channels of what is added to the stream",
    "olmo2": "post_attention_layernorm, whose gain is for channels of what is added to the stream",
    "glm4": "post_self_attn_layernorm, whose gain is for channels of what is added to the stream",
    "t5": "what reads and writes its residual stream is not in the table",
    "llava": "what reads and writes its residual stream is not in the table",
    "deepseek_v3": "what reads and writes its residual stream is not in the table",
}
