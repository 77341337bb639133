"""Modules whose weights are packed: linears, embeddings and fused experts.

A module keeps its class and its code: products and lookups are run by a backend, and `weight`, if other code accesses it, is
expanded for as long as it is used. Before `fill` it is a shell without a weight, as transformers expects while it loads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from compress.architecture.experts import forward, watched
from compress.architecture.qlinear import RoundedInputs
from compress.errors import UsageError
from compress.kernels.dispatch import Backend, Work, choose, load_backend
from compress.kernels.native.expanded import expanded
from compress.kernels.native.op import Arguments, multiplied, needs_operator
from compress.kernels.native.packed import Packed
from compress.kernels.native.rotate_inputs import mixed
from compress.numerics.input_rotation import rotated
from compress.numerics.inputs import InputRounding
from compress.spec.weight_state import State


@dataclass(frozen=True)
class Stack:
    """Matrices of one state and one shape that become a stack; each is read when it is needed."""

    count: int
    read: Callable[[int], Packed]


class PackedWeight(nn.Module):
    """A packed weight [experts?, rows, columns]; its buffers are the parts that its backend keeps."""

    like: torch.Tensor
    sources = 1
    """The number of weights on disk that it is made of."""
    _made: tuple[Packed, Backend, tuple[torch.Tensor | None, ...]] | None = None

    def __init__(
        self, packed: Packed | Stack, dtype: torch.dtype, turned: bool = False, looked_up: bool = False,
        backend: str | None = None, device: torch.device | None = None, multiplied: bool = True,
    ) -> None:  # fmt: skip
        """`dtype` is that of activations; `device` is where it is used, by default where its parts lie.

        Raises UsageError if the named backend refuses.
        """
        super().__init__()
        if isinstance(packed, Packed) and packed.parts["tiles"].dim() == 5:
            packed = Stack(len(packed.parts["tiles"]), packed.expert)
        if isinstance(packed, Packed) and "input_scale" in packed.parts:
            # A part of the inputs' rounding, of which backends need not know.
            parts = dict(packed.parts)
            self.register_buffer("input_scale", parts.pop("input_scale"))
            packed = replace(packed, parts=parts)
        packed, self.hadamard = packed.unrotated() if isinstance(packed, Packed) else (packed, 0)
        first = packed.read(0) if isinstance(packed, Stack) else packed
        self.state, self.size, self.turned = str(first.state), (first.rows, first.columns), turned
        self.stored, scale = (*first.parts,), first.parts.get("scale", first.parts["tiles"])
        self.asked, self.device = backend, (device or scale.device).type
        experts = packed.count if isinstance(packed, Stack) else None
        self.work = Work(first.state, *self.size, dtype, scale.dtype, self.device, turned, looked_up, multiplied, experts)
        # An empty tensor, which `to` casts, holds the dtype that the weight expands to.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device or scale.device), persistent=False)
        self._keep(packed)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of it has: everything but what was made of the addresses of its own parts."""
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    def _keep(self, packed: Packed | Stack) -> None:
        """Chooses a backend, and keeps the tensors that it prepares."""
        chosen = choose(self.work, self.asked)
        self.backend, self.rounds_inputs = chosen.name, chosen.rounds_inputs
        kept = _prepared(chosen, packed)
        for name, part in kept.items():
            self.register_buffer(name, part)
        self.names = ",".join(kept)

    def forward(self, what: str, *arguments: Any) -> torch.Tensor:
        """Calls the method `what`. Modules call it by `forward`, so that accelerate's hooks move parts that are elsewhere."""
        found: torch.Tensor = getattr(self, what)(*arguments)
        return found

    def packed(self) -> Packed:
        """The parts as a Packed."""
        parts = {name: self.get_buffer(name) for name in self.names.split(",")}
        return Packed(State.parse(self.state), *self.size, parts)

    def arguments(self, expert: int | None = None) -> Arguments:
        """The arguments of our operators for it, or for one of its experts."""
        # Not by get_buffer, which takes as long as a small product.
        parts: Any = [self._buffers[name] for name in self.names.split(",")]
        parts = parts if expert is None else [part[expert] for part in parts]
        return parts, self.names, self.state, *self.size, self.turned, self.backend

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None, expert: int | None = None) -> torch.Tensor:
        """x [..., inputs] -> [..., outputs], by one of the experts if there are several."""
        if expert is None and not needs_operator(x, bias):
            return multiplied(x, bias, *self.whole(), self.turned)
        found: torch.Tensor = torch.ops.compress.packed_linear(x, bias, *self.arguments(expert))
        return found

    def whole(self) -> tuple[Packed, Backend]:
        """The parts as a Packed, and the backend; made once for the same parts, for it takes as long as a small product."""
        made = self._made
        if made is None or made[1].name != self.backend or not all(map(is_, self._buffers.values(), made[2])):
            made = self._made = self.packed(), load_backend(self.backend), (*self._buffers.values(),)
        return made[:2]

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs as the scheme rotates and rounds them."""
        scheme, columns = self.work.state.scheme, self.work.state.columns
        assert scheme is not None
        x = mixed(x, self.hadamard)
        if self.rounds_inputs or not scheme.inputs:
            return x
        divisor, kept = (self._buffers.get(name) for name in ("input_scale", "kept_columns"))
        how = InputRounding(scheme, divisor, kept, columns is not None and columns.int8)
        found: torch.Tensor = RoundedInputs.apply(x, how)  # type: ignore[no-untyped-call]
        return found

    def grouped(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [rows, inputs] -> [rows, outputs], rows offsets[e] to offsets[e + 1] by expert e; other rows are undefined."""
        found: torch.Tensor = torch.ops.compress.packed_experts(x, offsets, *self.arguments())
        return found

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., columns] for ids [...]."""
        found: torch.Tensor = torch.ops.compress.packed_rows(ids, self.like.dtype, *self.arguments())
        return found

    def dense(self, expert: int | None = None) -> torch.Tensor:
        """One matrix, dequantized, [rows, columns]."""
        packed, backend = self.packed(), load_backend(self.backend)
        packed = packed if expert is None else packed.expert(expert)
        parts = [backend.rows(packed, rows, self.like.dtype) for rows in backend.chunks(packed)]
        return rotated(torch.cat(parts), self.hadamard)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        """Moves parts, but never casts them: scales in another dtype would have other values.

        Another kind of device needs another backend. Raises UsageError if the current one has reordered the codes.
        """
        here = fn(self.like).device
        elsewhere = here.type not in (self.device, "meta")
        if elsewhere and not set(self.stored) <= set(self._buffers):
            got = f"codes in the order of {self.backend}, which runs on {self.device}"
            raise UsageError(f"model.to('{here}')", "weights as they are stored", got, f"load the model with device='{here}'")
        for name, part in self._buffers.items():
            assert part is not None
            moved = fn(part)
            self._buffers[name] = moved if moved.dtype == part.dtype or name == "like" else part.to(moved.device)
        if elsewhere:
            self.device, self.work = here.type, replace(self.work, device=here.type)
            parts = {name: self._buffers.pop(name) for name in self.names.split(",")}
            stored: Any = {name: parts[name] for name in self.stored}
            packed = Packed(self.work.state, *self.size, stored)
            self._keep(packed if self.work.experts is None else Stack(self.work.experts, packed.expert))
        return self

    def extra_repr(self) -> str:
        return f"{self.state}, {self.size[0]} x {self.size[1]}, backend={self.backend}"


def _prepared(backend: Backend, packed: Packed | Stack) -> dict[str, torch.Tensor]:
    """The tensors that a backend prepares for a matrix, or for each of a stack."""
    if isinstance(packed, Packed):
        return backend.prepare(packed)
    kept: dict[str, torch.Tensor] = {}
    for index in range(packed.count):
        for name, part in backend.prepare(packed.read(index)).items():
            if not index:
                kept[name] = part.new_empty(packed.count, *part.shape)
            kept[name][index] = part
    return kept


class DenseWeight(nn.Module):
    """A weight [experts, rows, columns] that is not packed, although others of its module are."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)

    def forward(self, what: str, *arguments: Any) -> torch.Tensor:
        """As of a PackedWeight."""
        found: torch.Tensor = getattr(self, what)(*arguments)
        return found

    def grouped(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return _grouped(x, self.values, offsets)

    def dense(self, expert: int) -> torch.Tensor:
        return self.values[expert]


def _grouped(x: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.moe import _grouped_mm

    # The first and the last expert also take rows that belong to none, so that no number and no gradient is undefined.
    ends = torch.cat([offsets[1:-1], offsets.new_full((1,), x.shape[0])])
    found: torch.Tensor = _grouped_mm(x, matrices.mT, ends)
    return found


class Shell(nn.Module):
    """Mixed into a module whose parameters are packed: `awaited` holds those not loaded yet, with a shape but no memory."""

    awaited: dict[str, torch.Tensor]
    awaited_bytes: int
    """Bytes of its weights in memory."""
    stand_in: torch.Tensor
    """Stands for its weights while accelerate assigns modules to devices."""

    def _arrived(self, name: str) -> None:
        del self.awaited[name]
        if not self.awaited:
            del self.stand_in


class PackedLinear(Shell):
    """y = x @ w.T + b, or a Conv1D's y = x @ w + b."""

    bias: torch.Tensor | None

    def fill(self, weight: PackedWeight) -> None:
        """Sets its weight, which several modules may share."""
        self.packed_weight = weight
        self._arrived("weight")

    @property
    def weight(self) -> torch.Tensor:
        return self.awaited["weight"] if self.awaited else expanded(self.packed_weight("dense"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not by a call of the module, which takes as long as a small product; accelerate's hooks are in `forward`.
        weight: Any = self._modules["packed_weight"]
        found: torch.Tensor = weight.forward("linear", x, self._parameters["bias"])
        return found


class Rounds(Shell):
    """Rotates and rounds its inputs, as the scheme of its weight says."""

    packed_weight: PackedWeight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(self.packed_weight("rounded", x))
        return out


class PackedEmbedding(PackedLinear):
    """Rows of a packed matrix; a `padding_idx` matters to gradients only."""

    max_norm: float | None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.packed_weight("lookup", ids) if self.max_norm is None else super().forward(ids)
        return found


Place = tuple[int, int]
"""Position of a part of an expert's rows: (which of the module's weights, which matrix stacked there)."""


class PackedExperts(Shell):
    """Fused experts; `packed_weights` hold the parts of their stacked parameters, which `runs` assigns to experts."""

    is_transposed: bool
    runs: dict[str, list[tuple[tuple[int, ...], int, int]]]
    """By parameter: (the weights that hold the parts of some experts, the range of these experts in `_order`)."""

    def fill_experts(
        self, name: str, weights: list[nn.Module], experts: list[list[Place]], turned: bool, device: torch.device
    ) -> None:
        """Sets the weights of the parameter `name`, and for each expert the positions of the parts of its rows.

        All experts with a matrix in one weight must have their parts in the same weights.
        """
        if "packed_weights" not in self._modules:
            self.packed_weights, self.places, self.runs = nn.ModuleDict(), {}, {}
        self.packed_weights[name] = nn.ModuleList(weights)
        self.places[name] = (experts, turned)
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for expert in sorted(range(len(experts)), key=lambda e: experts[e][0]):
            alike[tuple(number for number, _ in experts[expert])].append(expert)
        self.runs[name], order = [], list[int]()
        for numbers, members in alike.items():
            self.runs[name].append((numbers, len(order), len(order) + len(members)))
            order += members
        if order != [*range(len(experts))]:
            self.register_buffer(f"{name}_order", torch.tensor(order, device=device), persistent=False)
        self._arrived(name)

    def product(self, name: str, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [rows, inputs] by the matrices of a stacked parameter -> [rows, outputs]; nothing waits for a device.

        Rows are sorted by expert: those of expert e begin at offsets[e], int32 [experts + 1], and end at offsets[e + 1].
        """
        if name not in self.runs:
            matrices: torch.Tensor = getattr(self, name)
            return _grouped(x, matrices.mT if self.is_transposed else matrices, offsets)
        order, runs = self._buffers.get(f"{name}_order"), self.runs[name]
        if order is None and len(runs) == 1:
            return self._run(name, runs[0][0], x, offsets)
        # Experts of one run are neighbours, so that the rows of each run are contiguous.
        rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
        if order is not None:
            held = torch.searchsorted(offsets[1:], rows, right=True)
            by = order.argsort()[held].argsort(stable=True)
            x, offsets = x[by], pad(offsets.diff()[order].cumsum(0, dtype=offsets.dtype), (1, 0))
        out = None
        for numbers, start, stop in runs:
            found = self._run(name, numbers, x, offsets[start : stop + 1])
            out = found if out is None else torch.where((rows >= offsets[start])[:, None], found, out)
        assert out is not None
        return out if order is None else out[by.argsort()]

    def _run(self, name: str, numbers: tuple[int, ...], x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        weights: Any = self.packed_weights[name]
        parts = [weights[number]("grouped", x, offsets) for number in numbers]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def expanded(self, name: str) -> torch.Tensor:
        """The stacked parameter, dequantized, in its stored orientation."""
        if name in self.awaited:
            return self.awaited[name]
        weights: Any = self.packed_weights[name]
        experts, turned = self.places[name]
        dense = torch.stack([torch.cat([weights[number]("dense", index) for number, index in parts]) for parts in experts])
        return expanded(dense.mT if turned else dense)


class WatchedExperts(PackedExperts):
    """Fused experts that compute by transformers' interface, which calls `product` for each stacked parameter."""

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return forward(self, hidden, top_k_index, top_k_weights)


def hollow(module: nn.Module, rounds: bool) -> None:
    """Removes the weight of a Linear, Embedding or Conv1D until `fill`. `rounds`: whether inputs are rotated or rounded."""
    from transformers.pytorch_utils import Conv1D

    base: Any = next(kind for kind in (nn.Linear, nn.Embedding, Conv1D) if isinstance(module, kind))
    cls: Any = type(module)
    packed = type(f"Packed{base.__name__}", (PackedEmbedding if base is nn.Embedding else PackedLinear, base), {})
    # A class with its own forward comes first in the MRO; its call of super().forward finds ours.
    kinds = (packed,) if cls is base else (cls, packed)
    kinds = (Rounds, *kinds) if rounds else kinds
    _become(module, type(f"Packed{cls.__name__}", kinds, {}), ["weight"])


def hollow_experts(module: nn.Module, names: list[str]) -> None:
    """Removes stacked parameters of experts until `fill_experts`."""
    mixin = WatchedExperts if watched(module) else PackedExperts
    held = {name: property(partial(_expanded, name)) for name in names}
    _become(module, type(f"Packed{type(module).__name__}", (mixin, type(module)), held), names)


def _expanded(name: str, module: PackedExperts) -> torch.Tensor:
    return module.expanded(name)


def _become(module: nn.Module, cls: type, names: list[str]) -> None:
    module.register_buffer("stand_in", torch.empty(1, device="meta"), persistent=False)
    awaited = {}
    for name in names:
        dense = module._parameters.pop(name)
        assert dense is not None
        awaited[name] = torch.empty((), dtype=dense.dtype, device="cpu").expand(dense.shape)
        # transformers initialises parameters that it has not loaded, unless they have this attribute.
        awaited[name]._is_hf_initialized = True  # type: ignore[attr-defined]
    module.__class__ = cls
    module.awaited, module.awaited_bytes = awaited, 0  # type: ignore[assignment]
