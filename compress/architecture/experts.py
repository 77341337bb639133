"""Experts: routed experts, computed so that the inputs of each can be observed.

Registered as an implementation of transformers' own experts interface, beside its grouped and batched ones. A
family that computes its experts elsewhere (Llama 4's batched product) cannot be observed; `watched` is false for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from compress.spec.weight_state import Weight

IMPLEMENTATION = "compress"
INPUT, MIDDLE, OUTPUT = "input", "middle", "output"
"""The two activations that an expert's weights read: its tokens' hidden states, and the gated product; and what it adds."""


class Routed(NamedTuple):
    """The inputs of all experts, sorted by expert: expert e reads `rows[offsets[e]:offsets[e + 1]]`."""

    rows: torch.Tensor
    offsets: tuple[int, ...]
    tokens: torch.Tensor
    """The token that each row belongs to, int64 [rows]."""
    all_of: Callable[[int], torch.Tensor]
    """What an expert would read if every token were sent to it [tokens, width], computed when it is asked for."""

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The input rows of one expert, and the token that each belongs to."""
        rows = slice(self.offsets[expert], self.offsets[expert + 1])
        return self.rows[rows], self.tokens[rows]

    def everywhere(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as if the router had sent every token to this expert."""
        x = self.all_of(expert)
        return x, torch.arange(len(x), device=x.device)


def watched(module: nn.Module) -> bool:
    """Whether a module computes its experts through transformers' interface, so that a listener sees their inputs."""
    return all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "_apply_gate", "down_proj"))


def register() -> None:
    """Makes the implementation known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def forward(module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Output [tokens, hidden] of `hidden` [tokens, hidden] routed to top_k_index [tokens, k] with those weights.

    `module.listener(which, Routed)`, if there is one, sees each expert's inputs before its weights are used.
    """
    order = top_k_index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(order.values, torch.arange(module.num_experts + 1, device=hidden.device), out_int32=True)
    tokens = order.indices // top_k_index.shape[-1]
    rows = hidden[tokens]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    listener, packed = getattr(module, "listener", None), hasattr(module, "product")
    # `tolist` waits for the device, so it is left to those that need numbers; packed weights do not.
    ends = () if packed and listener is None else tuple(offsets.tolist())

    def product(inputs: torch.Tensor, name: str) -> torch.Tensor:
        out: torch.Tensor = module.product(name, inputs, offsets) if packed else _dense(module, name, inputs, ends)
        bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
        return out if bias is None else out + bias[order.values]

    def gated(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        return out

    def middle(expert: int) -> torch.Tensor:
        bias = getattr(module, f"{first}_bias")[expert] if module.has_bias else None
        return gated(linear(hidden, _matrix(module, first, expert), bias))

    if listener is not None:
        listener(INPUT, Routed(rows, ends, tokens, lambda _: hidden))
    between = gated(product(rows, first))
    del rows
    if listener is not None:
        listener(MIDDLE, Routed(between, ends, tokens, middle))
    out = product(between, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order.indices].unsqueeze(-1)
    if listener is not None:
        listener(OUTPUT, Routed(out, ends, tokens, _nothing))
    # A sum over each token's experts adds in fp32, whatever the dtype.
    return out[order.indices.argsort()].view(*top_k_index.shape, -1).sum(dim=1).to(hidden.dtype)


def _matrix(module: Any, name: str, expert: int) -> torch.Tensor:
    """The matrix [out, in] of one expert."""
    matrix: torch.Tensor = getattr(module, name)[expert]
    return matrix.T if module.is_transposed else matrix


def _nothing(expert: int) -> torch.Tensor:
    """An output is weighted by the router, which has no weight for a token that it sends elsewhere."""
    raise LookupError(expert)


def _dense(module: Any, name: str, x: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    """x [rows, inputs], sorted by expert, by the matrices of a stacked parameter -> [rows, outputs]."""
    # Unbound once: indexing each expert by itself would make a gradient as large as the whole stack.
    matrices = [matrix.T if module.is_transposed else matrix for matrix in getattr(module, name).unbind()]
    parts = [linear(x[start:end], matrices[e]) for e, (start, end) in enumerate(pairwise(offsets)) if start < end]
    return torch.cat(parts) if parts else linear(x, matrices[0])


def experts_of(weights: list[Weight]) -> list[tuple[Weight, int]]:
    """Every matrix of weights that hold experts."""
    return [(w, e) for w in weights for e in (range(w.experts) if w.experts is not None else [_expert(w)])]


def _expert(weight: Weight) -> int:
    """Which expert a weight belongs to, by its name on disk."""
    number = re.search(r"experts\.(\d+)\.", weight.name)
    assert number is not None, weight.name
    return int(number[1])
