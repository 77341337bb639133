"""Decode block: a decoder block of a Llama for a token of each text, in one call.

Norms, products, rotation, cache, attention and gated products are the kernels that modules would call, so that a block has the
same bits; what is saved is Python between them, which in a small model takes longer than the products. Adapters, hooks, weights
that were moved or replaced, and caches of other kinds go by the modules' own code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from compress.kernels.cpu.library import DTYPES, LANES, MOST, CBlock, CLinear, CScaled, library
from compress.kernels.native.integers import rounding
from compress.kernels.native.modules import PackedLinear, PackedWeight, Rounds
from compress.kernels.native.simd import exact_up_to, weight_of
from compress.layerwise.growing_cache import GrowingLayer
from compress.runtime.attention import NAME, masks_keys
from compress.runtime.one_token import takes_rotated

ATTENTION, GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
"""Of each head of queries and of keys, in families that have them."""
_NORM_FIELDS = ("first_norm", "second_norm", "query_norm", "key_norm")
_FIELDS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class Made:
    """What was made of a block's parts: its arguments, or none where the kernel does not take it."""

    held: tuple[Any, ...]
    """Modules and tensors of which it was made."""
    job: CBlock | None
    kept: tuple[Any, ...] = ()
    """What the arguments have addresses of."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Made:
        """A copy of a block has other parts."""
        return Made((), None)


def block_of(layer: Any) -> CBlock | None:
    """The arguments of a block whose modules are quick, made once for the same parts; None if a module has to be called."""
    attention, gated = layer._modules["self_attn"], layer._modules["mlp"]
    inner = [attention._modules[name] for name in HEAD_NORMS if name in attention._modules]
    modules = [attention, gated, *(layer._modules[name] for name in NORMS), *inner]
    linears = [*attention._modules.values(), *gated._modules.values()]
    if any(module._forward_hooks or module._forward_pre_hooks for module in chain(modules, linears)):
        return None
    made: Made | None = layer.__dict__.get("quick_made")
    if made is None or not _same(made.held, _held(modules, linears)):
        made = layer.__dict__["quick_made"] = _made(tuple(_held(modules, linears)), *modules)
    return made.job


def _same(held: tuple[Any, ...], now: Iterator[Any]) -> bool:
    return all(map(is_, held, now)) and next(now, now) is now


def _held(modules: list[Any], linears: list[Any]) -> Iterator[Any]:
    yield from modules
    yield from linears
    for norm in modules[2:]:
        yield norm._parameters["weight"]
    for linear in linears:
        weight = linear._modules.get("packed_weight")
        if weight is not None:
            yield from (weight, linear._parameters.get("bias"))
            yield from weight._buffers.values()


def _made(held: tuple[Any, ...], attention: Any, gated: Any, *norms: Any) -> Made:
    """`norms` are those of the block, and of heads if there are such."""
    linears = [attention._modules.get(name) for name in ATTENTION] + [gated._modules.get(name) for name in GATED]
    scales = [norm._parameters["weight"] for norm in norms]
    dtype, size = scales[0].dtype, attention.head_dim
    if not all(_takes(linear, dtype) for linear in linears) or any(one.dtype != dtype for one in scales):
        return Made(held, None)
    weights = [linear._modules["packed_weight"].whole()[0] for linear in linears]
    query, key, value, output, gate, up, down = weights
    inputs = {query.columns, key.columns, value.columns, gate.columns, up.columns, output.rows, down.rows}
    fits = inputs == {scales[0].numel()} == {scales[1].numel()} and gate.rows == up.rows == down.columns
    fits = fits and key.rows == value.rows and query.rows == output.columns and all(one.numel() == size for one in scales[2:])
    if not fits or size % LANES or size > MOST or query.rows % size or key.rows % size:
        return Made(held, None)
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
    return Made(held, job, (weights, structures))


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


class QuickBlock(nn.Module):
    """Mixed into x + attention(norm(x)), and to that the gated products of its norm."""

    training: bool
    quick_cache: str

    def forward(self, *given: Any, **named: Any) -> Any:
        x: Any = given[0] if len(given) == 1 else named.get("hidden_states")
        held: Any = named.get(self.quick_cache)
        angles: Any = named.get("position_embeddings")
        attention: Any = self._modules["self_attn"]
        quick = x is not None and len(given) < 2 and held is not None and not self.training and not torch.is_grad_enabled()
        if quick and attention.config._attn_implementation == NAME and takes_rotated(x, angles, attention.head_dim):
            found = _run(self, x, angles, held.layers, attention.layer_idx, named.get("attention_mask"))
            if found is not None:
                return found
        return super().forward(*given, **named)


def _run(layer: Any, x: torch.Tensor, angles: Any, layers: Any, number: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    """What a block makes of x [texts, 1, width]; None if a module has to be called."""
    cache: Any = layers[number] if number < len(layers) else None
    job = block_of(layer) if type(cache) is GrowingLayer else None
    if job is None or DTYPES[x.dtype] != job.dtype:
        return None
    texts = x.shape[0]
    like = x.new_empty(texts, job.groups, 1, job.size)
    if mask is not None and not masks_keys(mask, texts, cache.get_seq_length() + 1):
        return None
    _, job.count, keys, values = cache.more(like, like)
    out = torch.empty_like(x)
    job.x, job.out, job.cos, job.sin = x.data_ptr(), out.data_ptr(), angles[0].data_ptr(), angles[1].data_ptr()
    job.keys, job.values, job.batch, job.room = keys.data_ptr(), values.data_ptr(), texts, keys.shape[2]
    job.angles = 0 if angles[0].shape[0] == 1 else job.size
    job.mask, job.mask_batch = (None, 0) if mask is None else (mask.data_ptr(), 0 if mask.shape[0] == 1 else mask.stride(0))
    library().block(job)
    return out
