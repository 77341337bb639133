"""The operators `compress::packed_linear`, `packed_experts` and `packed_rows`.

They multiply by a packed weight, multiply by a stack (rows of each expert by its matrix), and look rows up; eager, compiled
and exported. `parts` are the tensors that a backend keeps for a weight, `names` their names. Gradients go to x and to the
bias; codes have none. Registered by plain definitions, whose calls cost a quarter of a custom_op's.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from compress.kernels.dispatch import Backend, load_backend
from compress.kernels.native.packed import Packed
from compress.spec.weight_state import State

Arguments = tuple[list[torch.Tensor], str, str, int, int, bool, str]
"""Arguments for a weight: parts, their names, state, rows, columns, whether inputs are in rows, backend."""
_WEIGHT = "Tensor[] parts, str names, str state, int rows, int columns, bool turned, str backend"
_LIBRARY = torch.library.Library("compress", "DEF")

_state = lru_cache(maxsize=256)(State.parse)


def _weight(
    parts: list[torch.Tensor], names: str, state: str, rows: int, columns: int, turned: bool, backend: str
) -> tuple[Packed, Backend]:
    return Packed(_state(state), rows, columns, dict(zip(names.split(","), parts, strict=True))), load_backend(backend)


def _linear(x: torch.Tensor, bias: torch.Tensor | None, *weight: Any) -> torch.Tensor:
    (packed, runs), turned = _weight(*weight), weight[5]
    return multiplied(x, bias, packed, runs, turned)


def multiplied(x: torch.Tensor, bias: torch.Tensor | None, packed: Packed, runs: Backend, turned: bool) -> torch.Tensor:
    """x [..., inputs] -> [..., outputs]: what `packed_linear` computes."""
    *leading, inputs = x.shape
    flat = x if len(leading) == 1 else x.reshape(-1, inputs)
    outputs = packed.columns if turned else packed.rows
    # Not len(flat), which is written in Python.
    out = runs.linear(flat, packed, bias, turned) if flat.shape[0] else flat.new_empty(0, outputs)
    return out if len(leading) == 1 else out.view(*leading, outputs)


def needs_operator(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether something but the numbers is asked of a product: gradients, a graph, a trace. Else `multiplied` does, without the
    operator's call, which takes as long as a small product."""
    return (
        type(x) is not torch.Tensor
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _input_gradient(gradient: torch.Tensor, *weight: Any) -> torch.Tensor:
    (packed, runs), turned = _weight(*weight), weight[5]
    found = _times_weight(gradient.reshape(-1, gradient.shape[-1]), packed, runs, turned)
    return found.view(*gradient.shape[:-1], found.shape[-1])


def _experts(x: torch.Tensor, offsets: torch.Tensor, *weight: Any) -> torch.Tensor:
    packed, runs = _weight(*weight)
    return runs.grouped(x, packed, offsets) if len(x) else _like(x, offsets, *weight)


def _experts_gradient(gradient: torch.Tensor, offsets: torch.Tensor, *weight: Any) -> torch.Tensor:
    packed, runs = _weight(*weight)
    found = gradient.new_zeros(len(gradient), packed.columns)
    # Training may wait for the device; inference must not.
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start < end:
            found[start:end] = _times_weight(gradient[start:end], packed.expert(expert), runs, False)
    return found


def _times_weight(gradient: torch.Tensor, packed: Packed, runs: Backend, turned: bool) -> torch.Tensor:
    """gradient [tokens, outputs] -> [tokens, inputs], summed in fp32."""
    wide = gradient.float()
    found = wide.new_zeros(len(wide), packed.rows if turned else packed.columns)
    for part in runs.chunks(packed):
        dense = runs.rows(packed, part, torch.float32)
        if turned:
            found[:, part] = wide @ dense.T
        else:
            found.addmm_(wide[:, part], dense)
    return found.to(gradient.dtype)


def _rows(ids: torch.Tensor, dtype: torch.dtype, *weight: Any) -> torch.Tensor:
    packed, runs = _weight(*weight)
    return runs.lookup(packed, ids.reshape(-1)).to(dtype).view(*ids.shape, packed.columns)


def _like(x: torch.Tensor, _: Any, *weight: Any) -> Any:
    """An empty tensor like the outputs for x [..., inputs], in its dtype."""
    *_, rows, columns, turned, _ = weight
    return x.new_empty(*x.shape[:-1], columns if turned else rows)


def _like_gradient(gradient: torch.Tensor, *weight: Any) -> Any:
    """An empty tensor like the gradient [..., inputs] for one of outputs [..., outputs]; `offsets` may come before the weight."""
    *_, rows, columns, turned, _ = weight
    return gradient.new_empty(*gradient.shape[:-1], rows if turned else columns)


def _like_rows(ids: torch.Tensor, dtype: torch.dtype, *weight: Any) -> Any:
    return ids.new_empty(*ids.shape, weight[4], dtype=dtype)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, bias, parts, *ctx.weight = inputs
    ctx.save_for_backward(*parts)
    ctx.biased = bias is not None


def _linear_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    x = torch.ops.compress.packed_input_gradient(gradient, parts, *ctx.weight) if ctx.needs_input_grad[0] else None
    bias = gradient.flatten(0, -2).sum(0) if ctx.biased and ctx.needs_input_grad[1] else None
    return x, bias, [None] * len(parts), *(None for _ in ctx.weight)


def _setup_experts(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, offsets, parts, *ctx.weight = inputs
    ctx.save_for_backward(offsets, *parts)


def _experts_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    offsets, *parts = ctx.saved_tensors
    x = torch.ops.compress.packed_experts_gradient(gradient, offsets, parts, *ctx.weight)
    return x, None, [None] * len(parts), *(None for _ in ctx.weight)


for _name, _takes, _run, _fake in (
    ("packed_linear", "Tensor x, Tensor? bias", _linear, _like),
    ("packed_input_gradient", "Tensor gradient", _input_gradient, _like_gradient),
    ("packed_experts", "Tensor x, Tensor offsets", _experts, _like),
    ("packed_experts_gradient", "Tensor gradient, Tensor offsets", _experts_gradient, _like_gradient),
    ("packed_rows", "Tensor ids, ScalarType dtype", _rows, _like_rows),
):
    _LIBRARY.define(f"{_name}({_takes}, {_WEIGHT}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"compress::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("compress::packed_linear", _linear_backward, setup_context=_setup_linear, lib=_LIBRARY)
torch.library.register_autograd("compress::packed_experts", _experts_backward, setup_context=_setup_experts, lib=_LIBRARY)
