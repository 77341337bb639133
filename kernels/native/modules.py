"""Modules whose weights are packed: linears, embeddings and fused experts.

A module keeps its class and its code: what reads its rows or multiplies by it is run by a backend, and `weight`, for whoever
asks for it, is expanded for as long as it is used. Before `fill` it is a shell without a weight, as transformers wants it
while it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from compress.experts import forward, watched
from compress.facts import State
from compress.kernels.dispatch import Backend, Work, choose, load_backend
from compress.kernels.native import op  # noqa: F401  (registers the operator)
from compress.kernels.native.packed import Packed
from compress.qlinear import RoundedInputs
from compress.scheme import Scheme


class PackedWeight(nn.Module):
    """A packed weight [experts?, rows, columns]; its buffers are the parts that its backend keeps."""

    like: torch.Tensor

    def __init__(
        self, packed: Packed, dtype: torch.dtype, turned: bool = False, looked_up: bool = False, backend: str | None = None
    ) -> None:
        """`dtype` is what it is used in. Raises UsageError where the backend that is asked for refuses."""
        super().__init__()
        self.state, self.size, self.turned = str(packed.state), (packed.rows, packed.columns), turned
        scale = packed.parts["scale"]
        work = Work(packed.state, *self.size, dtype, scale.dtype, scale.device.type, turned, looked_up)
        self.backend = choose(work, backend).name
        count = len(packed.parts["tiles"]) if packed.parts["tiles"].dim() == 5 else None
        for name, part in _prepared(load_backend(self.backend), packed, count).items():
            self.register_buffer(name, part)
        self.names = ",".join(self._buffers)
        # An empty tensor that `to` casts like any other: the dtype that the weight expands to.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=scale.device), persistent=False)

    def packed(self) -> Packed:
        """The parts with what they mean."""
        parts = {name: self.get_buffer(name) for name in self.names.split(",")}
        return Packed(State.parse(self.state), *self.size, parts)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None, expert: int | None = None) -> torch.Tensor:
        """x [..., inputs] -> [..., outputs], by one of the experts where there are several."""
        parts = [self.get_buffer(name) for name in self.names.split(",")]
        parts = parts if expert is None else [part[expert] for part in parts]
        found: torch.Tensor = torch.ops.compress.packed_linear(
            x, bias, parts, self.names, self.state, *self.size, self.turned, self.backend
        )
        return found

    def dense(self, expert: int | None = None) -> torch.Tensor:
        """What it means, [rows, columns] of one matrix."""
        packed, backend = self.packed(), load_backend(self.backend)
        packed = packed if expert is None else packed.expert(expert)
        return torch.cat([backend.rows(packed, rows, self.like.dtype) for rows in backend.chunks(packed)])

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., columns] for ids [...]."""
        return self.packed().take(ids.reshape(-1)).dequantize().to(self.like.dtype).view(*ids.shape, -1)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        """Moves parts, but never casts them: scales in another dtype would be other scales."""
        for name, part in self._buffers.items():
            assert part is not None
            moved = fn(part)
            self._buffers[name] = moved if moved.dtype == part.dtype or name == "like" else part.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.state}, {self.size[0]} x {self.size[1]}, backend={self.backend}"


def _prepared(backend: Backend, packed: Packed, count: int | None) -> dict[str, torch.Tensor]:
    """What a backend keeps of a matrix, or of each expert's."""
    if count is None:
        return backend.prepare(packed)
    if type(backend).prepare is Backend.prepare:
        return dict(packed.parts)
    first = backend.prepare(packed.expert(0))
    kept = {name: part.new_empty(count, *part.shape) for name, part in first.items()}
    for index in range(count):
        for name, part in (first if not index else backend.prepare(packed.expert(index))).items():
            kept[name][index] = part
    return kept


class DenseWeight(nn.Module):
    """A weight [experts?, rows, columns] that is not packed, among others that are."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None, expert: int | None = None) -> torch.Tensor:
        return linear(x, self.dense(expert), bias)

    def dense(self, expert: int | None = None) -> torch.Tensor:
        return self.values if expert is None else self.values[expert]


class Shell(nn.Module):
    """Mixed into a module whose parameters are packed: those it waits for are `awaited`, in their shape and in no memory."""

    awaited: dict[str, torch.Tensor]


class PackedLinear(Shell):
    """y = x @ w.T + b, or a Conv1D's y = x @ w + b."""

    bias: torch.Tensor | None

    def fill(self, weight: PackedWeight) -> None:
        """Gives it its weight, which several modules may share."""
        self.packed_weight = weight
        self.awaited.clear()

    @property
    def weight(self) -> torch.Tensor:
        return self.awaited["weight"] if self.awaited else self.packed_weight.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed_weight.linear(x, self.bias)


class Rounds(Shell):
    """Rounds what it reads, as its scheme says."""

    scheme: Scheme

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = RoundedInputs.apply(x, self.scheme)  # type: ignore[no-untyped-call]
        out: torch.Tensor = super().forward(rounded)
        return out


class PackedEmbedding(PackedLinear):
    """Rows of a packed matrix; a `padding_idx` matters to gradients only."""

    max_norm: float | None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.packed_weight.lookup(ids) if self.max_norm is None else super().forward(ids)
        return found


Place = tuple[int, int | None]
"""Of a part of an expert's rows: which of the module's weights, and which expert of that."""


class PackedExperts(Shell):
    """Fused experts; `packed_weights` hold what their stacked parameters are made of."""

    def fill_experts(self, name: str, weights: list[nn.Module], experts: list[list[Place]], turned: bool) -> None:
        """For the parameter `name`: its weights, and for each expert where its rows are, one part after the other."""
        if "packed_weights" not in self._modules:
            self.packed_weights, self.places = nn.ModuleDict(), {}
        self.packed_weights[name] = nn.ModuleList(weights)
        self.places[name] = (experts, turned)
        del self.awaited[name]

    def multiplier(self, name: str) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """What multiplies the inputs of an expert by its matrix of a stacked parameter."""
        weights: Any = self.packed_weights[name]
        experts, _ = self.places[name]

        def multiply(expert: int, x: torch.Tensor) -> torch.Tensor:
            parts = [weights[number].linear(x, None, index) for number, index in experts[expert]]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

        return multiply

    def expanded(self, name: str) -> torch.Tensor:
        """The stacked parameter that it means, as it is stored."""
        if name in self.awaited:
            return self.awaited[name]
        weights: Any = self.packed_weights[name]
        experts, turned = self.places[name]
        dense = torch.stack([torch.cat([weights[number].dense(index) for number, index in parts]) for parts in experts])
        return dense.mT if turned else dense


class WatchedExperts(PackedExperts):
    """Those that compute by transformers' interface, which then runs matrix by matrix."""

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return forward(self, hidden, top_k_index, top_k_weights)


def hollow(module: nn.Module, scheme: Scheme) -> None:
    """Takes the weight of a Linear, Embedding or Conv1D away; it waits for `fill`."""
    from transformers.pytorch_utils import Conv1D

    base: Any = next(kind for kind in (nn.Linear, nn.Embedding, Conv1D) if isinstance(module, kind))
    cls: Any = type(module)
    packed = type(f"Packed{base.__name__}", (PackedEmbedding if base is nn.Embedding else PackedLinear, base), {})
    # A class with a forward of its own comes first, and finds ours where it calls its parent's.
    kinds = (packed,) if cls is base else (cls, packed)
    _become(module, type(f"Packed{cls.__name__}", (Rounds, *kinds) if scheme.inputs else kinds, {"scheme": scheme}), ["weight"])


def hollow_experts(module: nn.Module, names: list[str]) -> None:
    """Takes stacked parameters of experts away; they wait for `fill_experts`."""
    mixin = WatchedExperts if watched(module) else PackedExperts
    held = {name: property(partial(_expanded, name)) for name in names}
    _become(module, type(f"Packed{type(module).__name__}", (mixin, type(module)), held), names)


def _expanded(name: str, module: PackedExperts) -> torch.Tensor:
    return module.expanded(name)


def _become(module: nn.Module, cls: type, names: list[str]) -> None:
    awaited = {}
    for name in names:
        dense = module._parameters.pop(name)
        assert dense is not None
        awaited[name] = torch.empty((), dtype=dense.dtype, device="cpu").expand(dense.shape)
        # transformers initialises what it has not loaded, unless it bears this mark.
        awaited[name]._is_hf_initialized = True  # type: ignore[attr-defined]
    module.__class__ = cls
    module.awaited = awaited  # type: ignore[assignment]
