"""CPU backend: expands rows of the weight and multiplies, a chunk at a time.

A chunk is still in the cache between its expansion and its product, so this needs less memory traffic than the reference
backend, and keeps nothing dense. With smaller chunks the cost of more calls exceeds the gain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import linear

from compress.errors import Refusal
from compress.kernels.dispatch import Backend, Work

if TYPE_CHECKING:
    from compress.kernels.native.packed import Packed

_CHUNK = 1 << 20
"""Weights of a chunk."""


class Cpu(Backend):
    """Runs every scheme."""

    name = "cpu"
    keeps_columns: ClassVar[bool] = True

    def refuse(self, work: Work) -> None:
        if work.device != "cpu":
            raise Refusal(f"the weight lies on {work.device}", "load the model on the CPU")
        if work.turned:
            raise Refusal("a Conv1D adds over its rows, of which a chunk gives no output", "leave the backend to be chosen")

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        return by_chunks(self, x, packed, bias)


def by_chunks(backend: Backend, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """x [tokens, inputs] by a weight whose rows a backend expands, a chunk at a time: [tokens, outputs]."""
    out = x.new_empty(len(x), packed.rows)
    for rows in backend.chunks(packed, _CHUNK):
        out[:, rows] = linear(x, backend.rows(packed, rows, x.dtype), None if bias is None else bias[rows])
    return out
