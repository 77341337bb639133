"""Decode block: what a kernel gets of a decoder block, for a token of each text.

Norms, products, rotation, cache, attention and gated products, as Llama, Mistral, Qwen2 and Qwen3 have them, are the kernels that
modules would call, so that a block has the same bits; what is saved is Python between them, which in a small model takes longer
than the products. Adapters, hooks, and weights that were moved or replaced go by the modules' own code.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from itertools import chain
from operator import is_
from typing import Any

import torch

from compress.kernels.cpu.library import DTYPES, LANES, MOST, CBlock, CLinear, CScaled
from compress.kernels.native.integers import rounding
from compress.kernels.native.modules import PackedLinear, PackedWeight, Rounds
from compress.kernels.native.simd import exact_up_to, weight_of

ATTENTION, GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
"""Of each head of queries and of keys, in families that have them."""
_NORM_FIELDS = ("first_norm", "second_norm", "query_norm", "key_norm")
_FIELDS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class Made:
    """What was made of a block's parts: its arguments, or none where the kernel does not take it."""

    places: tuple[dict[str, Any], ...]
    """Of modules, parameters and buffers."""
    held: tuple[Any, ...]
    """What they held, of which it was made."""
    hooks: tuple[dict[int, Any], ...]
    job: CBlock | None = None
    kept: tuple[Any, ...] = ()
    """What the arguments have addresses of."""

    def holds(self) -> bool:
        """Whether it is what would be made now. Every block is asked at every token, so this is a few loops in C."""
        same = all(map(is_, chain.from_iterable(map(dict.values, self.places)), self.held))
        return same and sum(map(len, self.places)) == len(self.held) and not any(self.hooks)

    def __deepcopy__(self, memo: dict[int, Any]) -> Made:
        """One that holds for no parts, for a copy of a block has others."""
        return Made((), (None,), ())


def block_of(layer: Any) -> CBlock | None:
    """The arguments of a block whose modules are quick, made once for the same parts; None if a module has to be called."""
    made: Made | None = layer.__dict__.get("quick_made")
    if made is None or not made.holds():
        made = layer.__dict__["quick_made"] = _parts(layer)
        if any(made.hooks):
            return None
    return made.job


def _parts(layer: Any) -> Made:
    attention, gated = layer._modules["self_attn"], layer._modules["mlp"]
    inner = [attention._modules[name] for name in HEAD_NORMS if name in attention._modules]
    norms = [*(layer._modules[name] for name in NORMS), *inner]
    linears = [*attention._modules.values(), *gated._modules.values()]
    weights = [linear._modules["packed_weight"] for linear in linears if "packed_weight" in linear._modules]
    called = [attention, gated, *norms, *linears]
    hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    places = [layer._modules, attention._modules, gated._modules, *(norm._parameters for norm in norms)]
    places += [place for linear in linears for place in (linear._modules, linear._parameters)]
    places += [weight._buffers for weight in weights]
    found = Made((*places,), (*chain.from_iterable(map(dict.values, places)),), (*hooks,))
    return found if any(hooks) else _made(found, attention, gated, *norms)


def _made(parts: Made, attention: Any, gated: Any, *norms: Any) -> Made:
    """With its arguments; `norms` are those of the block, and of heads if there are such."""
    linears = [attention._modules.get(name) for name in ATTENTION] + [gated._modules.get(name) for name in GATED]
    scales = [norm._parameters["weight"] for norm in norms]
    dtype, size = scales[0].dtype, attention.head_dim
    if not all(_takes(linear, dtype) for linear in linears) or any(one.dtype != dtype for one in scales):
        return parts
    weights = [linear._modules["packed_weight"].whole()[0] for linear in linears]
    query, key, value, output, gate, up, down = weights
    inputs = {query.columns, key.columns, value.columns, gate.columns, up.columns, output.rows, down.rows}
    fits = inputs == {scales[0].numel()} == {scales[1].numel()} and gate.rows == up.rows == down.columns
    fits = fits and key.rows == value.rows and query.rows == output.columns and all(one.numel() == size for one in scales[2:])
    if not fits or size % LANES or size > MOST or query.rows % size or key.rows % size:
        return parts
    job = CBlock(
        heads=query.rows // size, groups=key.rows // size, size=size, scale=attention.scaling, dtype=DTYPES[dtype],
    )  # fmt: skip
    for field, norm, weight in zip(_NORM_FIELDS, norms, scales):
        setattr(job, field, CScaled(weight.data_ptr(), norm.quick_epsilon, norm.quick_plus_one))
    structures = [weight_of(weight) for weight in weights]
    for field, linear, weight, structure in zip(_FIELDS, linears, weights, structures, strict=True):
        bias = linear._parameters.get("bias")
        place = None if bias is None else bias.data_ptr()
        rounds = linear._modules["packed_weight"].backend == "integers"
        how = ctypes.addressof(rounding(weight)) if rounds else None
        setattr(job, field, CLinear(ctypes.addressof(structure), place, exact_up_to(weight, dtype), how))
    return replace(parts, job=job, kept=(weights, structures))


def _takes(linear: Any, dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies by a module's weight, without anything beside it."""
    if not isinstance(linear, PackedLinear) or "forward" in vars(linear):
        return False
    weight, bias = linear._modules.get("packed_weight"), linear._parameters.get("bias")
    if not isinstance(weight, PackedWeight) or weight.backend not in ("simd", "integers") or weight.turned:
        return False
    if weight.work.dtype != dtype or weight.hadamard or (isinstance(linear, Rounds) and not weight.rounds_inputs):
        return False
    state = weight.work.state
    plain = state.lowrank is None and state.columns is None and weight.work.experts is None and "forward" not in vars(weight)
    return plain and (bias is None or (bias.dtype == dtype and bias.is_contiguous()))
