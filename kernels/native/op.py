"""The operator `compress::packed_linear`: a linear whose weight is packed.

It runs eager, compiled and exported. `parts` are the tensors that a backend keeps of a matrix, `names` says what each is.
Gradients go to x and to the bias; codes have none. Registered with plain definitions, which cost a quarter of a custom_op's call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from compress.facts import State
from compress.kernels.dispatch import Backend, load_backend
from compress.kernels.native.packed import Packed

_WEIGHT = "Tensor[] parts, str names, str state, int rows, int columns, bool turned, str backend"
_LIBRARY = torch.library.Library("compress", "DEF")
_LIBRARY.define(f"packed_linear(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"packed_input_gradient(Tensor gradient, {_WEIGHT}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

_state = lru_cache(maxsize=256)(State.parse)


def _weight(parts: list[torch.Tensor], names: str, state: str, rows: int, columns: int, backend: str) -> tuple[Packed, Backend]:
    return Packed(_state(state), rows, columns, dict(zip(names.split(","), parts, strict=True))), load_backend(backend)


def _linear(
    x: torch.Tensor, bias: torch.Tensor | None, parts: list[torch.Tensor], names: str, state: str, rows: int, columns: int,
    turned: bool, backend: str,
) -> torch.Tensor:  # fmt: skip
    packed, runs = _weight(parts, names, state, rows, columns, backend)
    flat = x.reshape(-1, x.shape[-1])
    out = runs.linear(flat, packed, bias, turned) if len(flat) else flat.new_empty(0, columns if turned else rows)
    return out.view(*x.shape[:-1], out.shape[-1])


def _input_gradient(
    gradient: torch.Tensor, parts: list[torch.Tensor], names: str, state: str, rows: int, columns: int, turned: bool,
    backend: str,
) -> torch.Tensor:  # fmt: skip
    packed, runs = _weight(parts, names, state, rows, columns, backend)
    wide = gradient.reshape(-1, gradient.shape[-1]).float()
    found = wide.new_zeros(len(wide), rows if turned else columns)
    for part in runs.chunks(packed):
        dense = runs.rows(packed, part, torch.float32)
        if turned:
            found[:, part] = wide @ dense.T
        else:
            found.addmm_(wide[:, part], dense)
    return found.to(gradient.dtype).view(*gradient.shape[:-1], found.shape[-1])


def _fake(
    x: torch.Tensor, bias: Any, parts: Any, names: str, state: str, rows: int, columns: int, turned: bool, backend: str
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], columns if turned else rows)


def _fake_gradient(
    gradient: torch.Tensor, parts: Any, names: str, state: str, rows: int, columns: int, turned: bool, backend: str
) -> torch.Tensor:
    return gradient.new_empty(*gradient.shape[:-1], rows if turned else columns)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, bias, parts, *ctx.weight = inputs
    ctx.save_for_backward(*parts)
    ctx.biased = bias is not None


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    x = torch.ops.compress.packed_input_gradient(gradient, parts, *ctx.weight) if ctx.needs_input_grad[0] else None
    bias = gradient.flatten(0, -2).sum(0) if ctx.biased and ctx.needs_input_grad[1] else None
    return x, bias, [None] * len(parts), *(None for _ in ctx.weight)


for _name, _run, _meta in (("packed_linear", _linear, _fake), ("packed_input_gradient", _input_gradient, _fake_gradient)):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"compress::{_name}", _meta, lib=_LIBRARY)
torch.library.register_autograd("compress::packed_linear", _backward, setup_context=_setup, lib=_LIBRARY)
