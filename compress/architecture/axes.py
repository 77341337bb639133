"""Axes: what each dimension of each tensor counts, by model family.

Hidden channels, heads, neurons or experts. The table names tensors by their paths inside a block, in Llama's words, and their
dimensions as [out, in]. Several parts that follow each other are joined by `+`; `*2` is a part whose entries take two places
each. A bias has the first dimension of its matrix. What no part is cut of is empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.architecture.families import place_of
from compress.errors import Refusal
from compress.spec.kept import MLP, SHARED, Kept, Sizes
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    import torch

Dims = tuple[str, ...]
_NORM: Dims = ("hidden",)
_ATTENTION: dict[str, Dims] = {
    "self_attn.q_proj": ("queries", "hidden"), "self_attn.k_proj": ("groups", "hidden"),
    "self_attn.v_proj": ("groups", "hidden"), "self_attn.o_proj": ("hidden", "queries"),
    "self_attn.q_norm": ("",), "self_attn.k_norm": ("",), "input_layernorm": _NORM, "post_attention_layernorm": _NORM,
}  # fmt: skip
_ALL_HEADS: dict[str, Dims] = {"self_attn.q_norm": ("queries",), "self_attn.k_norm": ("groups",)}
"""Norms over all heads, not over one."""
_MORE_NORMS: dict[str, Dims] = {"pre_feedforward_layernorm": _NORM, "post_feedforward_layernorm": _NORM}
_MLP: dict[str, Dims] = {
    "mlp.gate_proj": ("units", "hidden"), "mlp.up_proj": ("units", "hidden"), "mlp.down_proj": ("hidden", "units"),
}  # fmt: skip
_ROUTED: dict[str, Dims] = {
    "mlp.gate": ("experts", "hidden"),
    **{path.replace("mlp.", "mlp.experts.#."): dims for path, dims in _MLP.items()},
}
_SHARED: dict[str, Dims] = {
    "mlp.shared_expert_gate": ("", "hidden"),
    **{path.replace("mlp.", "mlp.shared_expert."): dims for path, dims in _MLP.items()},
}
_LLAMA = {**_ATTENTION, **_MLP}
_GEMMA2 = {**_LLAMA, **_MORE_NORMS}
_MIXTRAL = {**_LLAMA, **_ROUTED}
_FAMILIES: dict[str, dict[str, Dims]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "stablelm"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "olmo2": {**_LLAMA, **_ALL_HEADS, **_MORE_NORMS},
    **dict.fromkeys(("mixtral", "qwen3_moe"), _MIXTRAL),
    "olmoe": {**_MIXTRAL, **_ALL_HEADS},
    "qwen2_moe": {**_MIXTRAL, **_SHARED},
    "gpt_oss": {
        **_ATTENTION, "self_attn.sinks": ("queries/head",), "mlp.router": ("experts", "hidden"),
        "mlp.experts.gate_up_proj": ("experts", "units*2", "hidden"), "mlp.experts.gate_up_proj_bias": ("experts", "units*2"),
        "mlp.experts.down_proj": ("experts", "hidden", "units"), "mlp.experts.down_proj_bias": ("experts", "hidden"),
    },
    "phi3": {
        **_ATTENTION, "self_attn.qkv_proj": ("queries+groups+groups", "hidden"), "mlp.gate_up_proj": ("units+units", "hidden"),
        "mlp.down_proj": ("hidden", "units"),
    },
    "glm4": {
        **_LLAMA, "mlp.gate_up_proj": ("units+units", "hidden"), "post_self_attn_layernorm": _NORM, "post_mlp_layernorm": _NORM,
    },
    "starcoder2": {**_ATTENTION, "mlp.c_fc": ("units", "hidden"), "mlp.c_proj": ("hidden", "units")},
    "gpt2": {
        "ln_1": _NORM, "ln_2": _NORM, "attn.c_attn": ("queries+groups+groups", "hidden"), "attn.c_proj": ("hidden", "queries"),
        "mlp.c_fc": ("units", "hidden"), "mlp.c_proj": ("hidden", "units"),
    },
    "opt": {
        **_ATTENTION, "self_attn.out_proj": ("hidden", "queries"), "self_attn_layer_norm": _NORM, "final_layer_norm": _NORM,
        "fc1": ("units", "hidden"), "fc2": ("hidden", "units"),
    },
    "gpt_neox": {
        "input_layernorm": _NORM, "post_attention_layernorm": _NORM, "attention.query_key_value": ("queries*3", "hidden"),
        "attention.dense": ("hidden", "queries"), "mlp.dense_h_to_4h": ("units", "hidden"),
        "mlp.dense_4h_to_h": ("hidden", "units"),
    },
}  # fmt: skip
POST_NORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), ("post_attention_layernorm", "post_feedforward_layernorm")),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}
"""Families whose blocks norm what attention and feed-forward add to the residual stream, with those norms."""
_OUTSIDE = re.compile(r"(?:^|\.)(embed_tokens|embed_in|wte|wpe|embed_positions|lm_head|embed_out|norm|ln_f|final_layer_?norm)$")
"""Modules outside of blocks; each has hidden channels in its last dimension."""
_NUMBER = re.compile(r"(^|\.)(\d+)(?=\.)")
_EXPERT = re.compile(r"(experts\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Slice:
    """A tensor of the smaller model: `source` is what it is cut out of, `dims` what its stored dimensions count."""

    name: str
    source: Weight
    dims: Dims
    layer: int | None
    """Its place among the kept layers."""
    expert: int | None
    """The number of the expert in the source, for a tensor of one expert."""

    @property
    def logical(self) -> Dims:
        """What the dimensions count, as [out, in]."""
        return _stored(self.source, self.dims)

    @property
    def stacked(self) -> bool:
        """Whether it holds all experts, each with neurons of its own."""
        return self.dims[:1] == ("experts",) and any(_part(dim) == "units" for dim in self.dims)

    def numbers(self, kept: Kept, sizes: Sizes) -> list[list[int] | None]:
        """Which entries of each stored dimension stay; None for all of them, as they are. `sizes` are the source's."""
        block = kept.blocks[self.layer] if self.layer is not None else None
        which = {"hidden": kept.hidden}
        if block is not None:
            inner = str(self.expert) if self.expert is not None else SHARED if "shared" in self.source.module else MLP
            if not self.stacked:
                which |= {"units": block.units.get(inner, ())}
            which |= {"groups": block.groups, "queries": block.queries, "experts": block.experts}
        found = []
        for dim, size in zip(self.dims, self.source.shape, strict=True):
            found.append(_entries(dim, size, which, sizes))
        return found

    def shape(self, kept: Kept, sizes: Sizes) -> tuple[int, ...]:
        """The stored shape."""
        numbers = self.numbers(kept, sizes)
        shape = [size if which is None else len(which) for which, size in zip(numbers, self.source.shape, strict=True)]
        if self.layer is not None and self.stacked:
            # Each expert of a stack keeps neurons of its own.
            units = len(kept.blocks[self.layer].units[str(kept.blocks[self.layer].experts[0])])
            shape = [units * _places(dim) if _part(dim) == "units" else n for dim, n in zip(self.dims, shape, strict=True)]
        return tuple(shape)

    def cut(self, value: torch.Tensor, kept: Kept, sizes: Sizes) -> torch.Tensor:
        """The kept entries of the stored value of `source`, or of one that is aligned with it."""
        import torch

        for axis, which in enumerate(self.numbers(kept, sizes)):
            if which is not None:
                value = value.index_select(axis, torch.tensor(which, device=value.device))
        if self.layer is None or not self.stacked:
            return value.contiguous()
        block, (axis,) = kept.blocks[self.layer], [axis for axis, dim in enumerate(self.dims) if _part(dim) == "units"]
        places = _places(self.dims[axis])
        each = [
            one.index_select(axis - 1, torch.tensor(_spread(block.units[str(expert)], places), device=value.device))
            for expert, one in zip(block.experts, value.unbind(), strict=True)
        ]
        return torch.stack(each)


def slices(weights: Sequence[Weight], family: str, layers: Sequence[int], experts: Sequence[Sequence[int]]) -> list[Slice]:
    """The tensors of the smaller model that keeps `layers`, and of the n-th of them `experts[n]`.

    Raises Refusal for a family, or a tensor of it, that is not in the table.
    """
    found: list[Slice] = []
    for weight in weights:
        if not weight.module:
            # A tensor that the model does not take.
            continue
        dims = dims_of(weight, family)
        if weight.block is None:
            found.append(Slice(weight.name, weight, dims, None, None))
            continue
        expert = int(match[2]) if weight.kind == "expert" and (match := _EXPERT.search(weight.name)) else None
        for number, layer in enumerate(layers):
            if weight.block != layer or (expert is not None and expert not in experts[number]):
                continue
            name = _NUMBER.sub(rf"\g<1>{number}", weight.name, count=1)
            if expert is not None:
                name = _EXPERT.sub(rf"\g<1>{list(experts[number]).index(expert)}", name, count=1)
            found.append(Slice(name, weight, dims, number, expert))
    return found


def dims_of(weight: Weight, family: str) -> Dims:
    """What the stored dimensions of a tensor of the model count. Raises Refusal for a family, or a tensor, not in the table."""
    table = _FAMILIES.get(family)
    if table is None:
        known = ", ".join(sorted(_FAMILIES))
        raise Refusal(f"no table says what the tensors of model_type '{family}' count; there is one for {known}",
                      "prune entries instead, as prune.wanda does")  # fmt: skip
    return _stored(weight, _outside(weight) if weight.block is None else _dims(weight, table))


def rescaled(value: torch.Tensor, part: Slice, family: str, before: Sizes, after: Sizes, tied: bool) -> torch.Tensor:
    """A tensor of the smaller model, rescaled where its family's code computes with the number of hidden channels.

    Gemma multiplies embeddings by its root. What tied embeddings give to the head is taken back in the last norm.
    """
    if not family.startswith("gemma") or before.hidden == after.hidden or part.layer is not None:
        return value
    ratio = (before.hidden / after.hidden) ** 0.5
    if part.source.kind == "embedding":
        value = (value.float() * ratio).to(value.dtype)
    elif tied and part.source.kind == "norm":
        value = ((1 + value.float()) / ratio - 1).to(value.dtype)
    return value


def _dims(weight: Weight, table: dict[str, Dims]) -> Dims:
    path = re.sub(r"experts\.\d+\.", "experts.#.", place_of(weight)[1])
    dims = table.get(path)
    if dims is None and path.endswith((".bias", ".e_score_correction_bias")):
        owner = table.get(path.rpartition(".")[0])
        dims = owner[:1] if owner is not None else None
    if dims is None or len(dims) != len(weight.shape):
        raise Refusal(f"no table says what the dimensions of '{weight.name}' count", "prune entries instead")
    return dims


def _outside(weight: Weight) -> Dims:
    if _OUTSIDE.search(weight.module) is None or len(weight.shape) > 2:
        raise Refusal(f"no table says what the dimensions of '{weight.name}' count", "prune entries instead")
    if len(weight.shape) == 2:
        return ("", "hidden")
    # The bias of a head has an entry for each token.
    return ("",) if re.search(r"lm_head|embed_out", weight.module) else ("hidden",)


def _stored(weight: Weight, dims: Dims) -> Dims:
    """The dimensions [out, in] as they are stored, or the other way round."""
    return (*dims[:-2], dims[-1], dims[-2]) if weight.transposed and len(dims) >= 2 else dims


def _part(dim: str) -> str:
    return re.split(r"[*/]", dim)[0]


def _places(dim: str) -> int:
    """How many entries of a tensor one number takes, heads aside."""
    return int(dim.partition("*")[2] or 1)


def _entries(dim: str, size: int, which: dict[str, tuple[int, ...]], sizes: Sizes) -> list[int] | None:
    if not dim:
        return None
    found: list[int] = []
    offset = 0
    for piece in dim.split("+"):
        part, places = _part(piece), _places(piece)
        if part not in which:
            return None
        if part in ("queries", "groups") and not piece.endswith("/head"):
            places *= sizes.head
        found += [offset + entry for entry in _spread(which[part], places)]
        # Pieces of a tensor count different things, and only one of them can be told from the rest.
        whole = {"hidden": sizes.hidden, "queries": sizes.queries, "groups": sizes.groups}.get(part)
        offset += size // len(dim.split("+")) if whole is None else whole * places
    return None if found == list(range(size)) else found


def _spread(numbers: Sequence[int], places: int) -> list[int]:
    """The entries that numbers of `places` entries each have."""
    return [number * places + n for number in numbers for n in range(places)]
