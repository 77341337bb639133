"""Sizes: a model's structure in numbers, read from its config and written to it.

What a config cannot say is found by building the smaller model from it: transformers then wants other shapes.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from compress.errors import InputError, Refusal
from compress.spec.kept import Sizes

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint

_LAYERS = ("num_hidden_layers", "n_layer")
_HIDDEN = ("hidden_size", "n_embd")
_QUERIES = ("num_attention_heads", "n_head")
_UNITS = ("intermediate_size", "n_inner", "ffn_dim")
_UNITS_OF = {"gpt2": ("n_inner",), "opt": ("ffn_dim",)}
"""Families whose code reads this key alone."""
_NO_GROUPS = ("gpt2", "gpt_neox", "opt")
"""Families with as many key-value heads as query heads, whatever else a config says."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_UNITS = ("moe_intermediate_size",)
_PLAIN_EXPERTS = ("mixtral", "olmoe", "gpt_oss")
"""Families whose experts have the width of `_UNITS`, whatever else a config says."""
_SHARED_UNITS = ("shared_expert_intermediate_size",)
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Keys whose list has an entry for each layer."""
_MIXED = ("mlp_only_layers", "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step")
"""Keys that give some layers experts and others none."""


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """The sizes that a checkpoint's config says. Raises InputError for one without layers and attention heads."""
    from compress.architecture.model_class import model_class

    text = model_class(checkpoint)[1].get_text_config()

    def size(keys: tuple[str, ...], otherwise: int = 0) -> int:
        found = (getattr(text, key, None) for key in keys)
        return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), otherwise)

    layers, hidden, queries = size(_LAYERS), size(_HIDDEN), size(_QUERIES)
    if not (layers and hidden and queries):
        expected = "layers, hidden channels and attention heads"
        raise InputError("config.json", expected, f"model_type '{text.model_type}' without them", "prune entries instead")
    experts, units = size(_EXPERTS), size(_UNITS_OF.get(text.model_type, _UNITS), 4 * hidden)
    plain = text.model_type in _PLAIN_EXPERTS
    expert_units = (units if plain else size(_EXPERT_UNITS, units)) if experts else 0
    mixed = any(getattr(text, key, None) not in (None, 0, 1, []) for key in _MIXED)
    dense = units if mixed or not experts else 0
    groups = queries if text.model_type in _NO_GROUPS else size(("num_key_value_heads",), queries)
    return Sizes(
        layers, hidden, queries, groups, size(("head_dim",), hidden // queries), dense, experts, expert_units,
        size(_SHARED_UNITS) if experts else 0,
    )  # fmt: skip


def resized_config(config: dict[str, Any], before: Sizes, after: Sizes, layers: tuple[int, ...]) -> dict[str, Any]:
    """config.json of the smaller model with these sizes, which has kept `layers`. Raises Refusal for what it cannot say."""
    made = copy.deepcopy(config)
    text: dict[str, Any] = made["text_config"] if isinstance(made.get("text_config"), dict) else made

    def put(keys: tuple[str, ...], old: int, new: int) -> None:
        # A null stands for what follows from other sizes, which may differ from now on.
        there = [key for key in keys if key in text and isinstance(text[key], int | None)]
        for key in there:
            text[key] = new
        if old != new and not there:
            raise Refusal(f"config.json has none of {', '.join(keys)} to say {new}", "keep that size")

    for keys, name in ((_LAYERS, "layers"), (_HIDDEN, "hidden"), (_QUERIES, "queries")):
        put(keys, getattr(before, name), getattr(after, name))
    if text.get("model_type") in _NO_GROUPS and after.groups != after.queries:
        raise Refusal("its heads of keys and values cannot be fewer than those of queries", "keep as many")
    if after.groups != after.queries or "num_key_value_heads" in text:
        text["num_key_value_heads"] = after.groups
    if after.head * after.queries != after.hidden or "head_dim" in text:
        text["head_dim"] = after.head
    if before.experts:
        put(_EXPERTS, before.experts, after.experts)
        moe = [key for key in _EXPERT_UNITS if isinstance(text.get(key), int)]
        moe = [] if text.get("model_type") in _PLAIN_EXPERTS else moe
        put(tuple(moe) or _UNITS, before.expert_units, after.expert_units)
        if before.shared_units:
            put(_SHARED_UNITS, before.shared_units, after.shared_units)
        for key in ("num_experts_per_tok", "moe_topk", "num_experts_per_token"):
            if isinstance(text.get(key), int):
                text[key] = min(text[key], after.experts)
    if before.units:
        put(_UNITS_OF.get(text.get("model_type", ""), _UNITS), before.units, after.units)
    if isinstance(text.get("word_embed_proj_dim"), int):
        if text["word_embed_proj_dim"] != before.hidden:
            raise Refusal("embeddings have a width of their own", "keep that size")
        text["word_embed_proj_dim"] = after.hidden
    if before.layers != after.layers:
        _cut_layers(text, before.layers, layers)
    return made


def _cut_layers(text: dict[str, Any], before: int, layers: tuple[int, ...]) -> None:
    """Takes dropped layers out of every list that has an entry for each."""
    for key in _MIXED:
        if text.get(key) not in (None, [], 0, 1):
            raise Refusal(f"{key}={text[key]} gives layers different parts", "keep all layers")
    for key, value in text.items():
        if not isinstance(value, list) or len(value) != before:
            continue
        if key not in _BY_LAYER:
            if key in ("architectures", "eos_token_id"):
                continue
            raise Refusal(f"{key} has as many entries as there are layers, and nothing tells whether it is about them",
                          "keep all layers")  # fmt: skip
        text[key] = [value[layer] for layer in layers]
    if isinstance(text.get("max_window_layers"), int):
        text["max_window_layers"] = sum(layer < text["max_window_layers"] for layer in layers)
