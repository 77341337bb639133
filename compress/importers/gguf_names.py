"""GGUF names: what llama.cpp calls tensors, and how it lays out their rows.

    model.layers.7.self_attn.q_proj.weight          blk.7.attn_q.weight
    model.layers.7.mlp.experts.3.up_proj.weight     blk.7.ffn_up_exps.weight[3], a matrix of a stack
    model.layers.7.mlp.experts.gate_up_proj         blk.7.ffn_gate_exps.weight and blk.7.ffn_up_exps.weight, every other row
Where positions are rotated in neighbouring pairs (`llama`), the rows of queries and keys change places: row i and row i + d / 2
of a head of d become neighbours. Gemma's norms multiply by 1 + w, and what is stored is 1 + w. Written from llama.cpp's
converter, which was read, and its tables in the package `gguf`, which the tests compare these with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
}  # fmt: skip
_MLP = {
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp", "mlp.experts.#.gate_proj": "ffn_gate_exps", "mlp.experts.#.up_proj": "ffn_up_exps",
    "mlp.experts.#.down_proj": "ffn_down_exps",
}  # fmt: skip
_SHARED = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
_MIXTRAL = {
    "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.experts.#.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.#.w2": "ffn_down_exps", "block_sparse_moe.experts.#.w3": "ffn_up_exps",
}  # fmt: skip
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_PHI = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GPT_OSS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp",
}  # fmt: skip
_GPT_OSS_FUSED = {
    "self_attn.sinks": (("attn_sinks.weight", 0, 1),),
    "mlp.experts.gate_up_proj": (("ffn_gate_exps.weight", 0, 2), ("ffn_up_exps.weight", 1, 2)),
    "mlp.experts.gate_up_proj_bias": (("ffn_gate_exps.bias", 0, 2), ("ffn_up_exps.bias", 1, 2)),
    "mlp.experts.down_proj": (("ffn_down_exps.weight", 0, 1),),
    "mlp.experts.down_proj_bias": (("ffn_down_exps.bias", 0, 1),),
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_STORED = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)(?:\[(\d+)\])?")
_ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


@dataclass(frozen=True)
class Architecture:
    """One model_type of transformers, and the architecture of llama.cpp that computes it."""

    name: str
    """`general.architecture` of its files."""
    modules: Mapping[str, str]
    """Modules of a block: transformers' path -> llama.cpp's name; # stands for the number of an expert."""
    pairs: bool = False
    """Whether rows of queries and keys change places."""
    one_added: bool = False
    """Whether norms are stored with one added."""
    fused: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    """Tensors of a block that are stored in pieces: path -> (name, first row, step) of each."""
    numbers: bool = False
    """Whether llama.cpp multiplies its matrices by a number each, as NVFP4 asks: run without biases."""
    back: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self.back.update({there: here for here, there in self.modules.items()})


@dataclass(frozen=True)
class Piece:
    """What a tensor of a checkpoint, or a part of its rows, is called in a file."""

    name: str
    first: int = 0
    step: int = 1
    """It has the rows `first::step`."""


ARCHITECTURES = {
    "llama": Architecture("llama", {**_ATTENTION, **_MLP}, pairs=True, numbers=True),
    "mistral": Architecture("llama", {**_ATTENTION, **_MLP}, pairs=True, numbers=True),
    "mixtral": Architecture("llama", {**_ATTENTION, **_MLP, **_MIXTRAL}, pairs=True, numbers=True),
    "qwen2": Architecture("qwen2", {**_ATTENTION, **_MLP}),
    "qwen3": Architecture("qwen3", {**_ATTENTION, **_MLP}, numbers=True),
    "qwen2_moe": Architecture("qwen2moe", {**_ATTENTION, **_MLP, **_EXPERTS, **_SHARED}),
    "qwen3_moe": Architecture("qwen3moe", {**_ATTENTION, **_MLP, **_EXPERTS}, numbers=True),
    "gemma2": Architecture("gemma2", {**_ATTENTION, **_MLP, **_GEMMA}, one_added=True),
    "gemma3_text": Architecture("gemma3", {**_ATTENTION, **_MLP, **_GEMMA}, one_added=True),
    "phi3": Architecture("phi3", _PHI),
    "gpt_oss": Architecture("gpt-oss", _GPT_OSS, fused=_GPT_OSS_FUSED),
}
"""By model_type of transformers."""


def stored_name(architecture: Architecture, name: str) -> str:
    """llama.cpp's name of a tensor of a checkpoint; empty if it has none."""
    path, _, part = name.rpartition(".")
    if path in _OUTSIDE and part == "weight":
        return f"{_OUTSIDE[path]}.weight"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return ""
    block, path, part = match.groups()
    expert = re.search(r"\.experts\.(\d+)\.", path)
    if expert is not None:
        path = path.replace(expert[0], ".experts.#.")
    there = architecture.modules.get(path, "")
    return f"blk.{block}.{there}.{part}{f'[{expert[1]}]' if expert else ''}" if there else ""


def pieces(architecture: Architecture, name: str) -> list[Piece]:
    """What a tensor of a checkpoint is stored as; nothing if llama.cpp has no place for it."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is not None and match[2] in architecture.fused:
        return [Piece(f"blk.{match[1]}.{there}", first, step) for there, first, step in architecture.fused[match[2]]]
    return [Piece(stored)] if (stored := stored_name(architecture, name)) else []


def owner_of(architecture: Architecture, name: str) -> str:
    """The tensor of a checkpoint that a tensor of a file is stored for; empty if there is none."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+?)(?:\[\d+\])?", name)
    if match is not None:
        for path, parts in architecture.fused.items():
            if any(there == match[2] for there, _, _ in parts):
                return f"model.layers.{match[1]}.{path}"
    return source_name(architecture, name)


def source_name(architecture: Architecture, name: str) -> str:
    """The inverse of `stored_name`; empty for a tensor that no weight of a checkpoint is stored as."""
    whole = name.removesuffix(".weight")
    if (outside := next((here for here, there in _OUTSIDE.items() if there == whole), "")) and name != whole:
        return f"{outside}.weight"
    match = _STORED.fullmatch(name)
    path = architecture.back.get(match[2], "") if match else ""
    if match is None or not path or ("#" in path) != (match[4] is not None):
        return ""
    return f"model.layers.{match[1]}.{path.replace('#', match[4] or '')}.{match[3]}"


def paired_heads(architecture: Architecture, stored: str, config: Mapping[str, Any]) -> int:
    """The number of heads whose rows change places in a tensor, by its name in the file; 0 where none do."""
    match = _STORED.fullmatch(stored)
    if match is None or not architecture.pairs or match[2] not in _ROTATED:
        return 0
    heads = config.get(_ROTATED[match[2]]) or config.get("num_attention_heads")
    return heads if isinstance(heads, int) else 0


def to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * d, ...] with row i and row i + d / 2 of each head as neighbours."""
    found: torch.Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return found


def from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `to_pairs`."""
    found: torch.Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return found


def scale_name(stored: str) -> str:
    """The name of the number that all values of a tensor are multiplied by, if it has one."""
    return re.sub(r"weight(?=(\[\d+\])?$)", "scale", stored)


def is_norm(stored: str) -> bool:
    """Whether a tensor is the weight of a norm, by its name in the file."""
    return stored.endswith("norm.weight")
