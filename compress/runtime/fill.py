"""Fill: loads the packed weights of a checkpoint into the modules of a model."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.architecture.hf_mapping import Group, Mapping
from compress.architecture.weight_map import meta_model
from compress.checkpoint.reader import CANONICAL, NATIVE, Checkpoint
from compress.errors import InputError, Refusal
from compress.freed_memory import trim_memory
from compress.importers import method_of
from compress.kernels.native.layout import Native
from compress.kernels.native.modules import DenseWeight, PackedExperts, PackedWeight, Stack, hollow, hollow_experts
from compress.kernels.native.narrow import whole
from compress.kernels.native.packed import Packed, pack
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import ties
from compress.numerics.qtensor import as_matrix
from compress.runtime.device_map import Where, offloaded, where
from compress.runtime.fuse_experts import Kind, Matrix, Piece, joined, stacks
from compress.spec.weight_state import Note, State, Weight, counted

_LOG = logging.getLogger("compress")


_MATRIX = 1 << 40
"""Rows of matrix m are numbered from m times this, which is more than a matrix has."""


def packable(dense_view: DenseView) -> tuple[dict[str, tuple[Weight, State]], list[Note]]:
    """The weights in codes that the native format holds, and why others stay dense. Raises InputError if there are none."""
    if isinstance(dense_view.format, Native):
        return dense_view.weights, []
    placed = {weight.name: weight for weight in dense_view.resolve(meta_model(dense_view.checkpoint)).weights}
    found, refused = {}, {}
    for name, (weight, state) in dense_view.weights.items():
        try:
            Native().refuse(placed[name], state)
            found[name] = weight, state
        except Refusal as refusal:
            refused[name] = refusal.reason
    notes = [*(dense_view.foreign.notes if dense_view.foreign else ()), *counted("dense", refused)]
    if not found:
        got = next(iter(refused.values()), "none")
        raise InputError(str(dense_view.checkpoint.path), "weights in codes that can be packed", got, "load it with transformers")
    return found, notes


def refuse_other(checkpoint: Checkpoint, repack: str = "") -> None:
    """Raises InputError for a checkpoint that is not in the native format; `repack` is the caller's option to load it anyway."""
    method = method_of(checkpoint)
    if method != NATIVE:
        got = {None: "a dense one", CANONICAL: "one in codes that are not packed"}.get(method, f"one packed as {method}")
        do = "make one with pack(format=native)" + (f", or pack it while it loads: {repack}" if method and repack else "")
        raise InputError(str(checkpoint.path), "an artifact in the native format", got, do)


class PackedWeights:
    """The packed weights for a model on the meta device: which modules take them, and how they are loaded."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, backend: str | None = None) -> None:
        """Turns the modules into shells. Raises InputError for weights that cannot be put into `model`."""
        self.model: Any = model
        self.dtype, self.backend = dtype, backend
        # transformers calls this inside a context where new tensors are created on the meta device.
        with torch.device("cpu"):
            self.dense_view = DenseView(checkpoint, rounded=False)
            self.weights, _ = packable(self.dense_view)
        self.native = isinstance(self.dense_view.format, Native)
        self._last: tuple[str, Packed] | None = None
        self.mapping = Mapping(model)
        groups = {group.parameter: group for group in self.mapping.groups(self.dense_view.logical)}
        packed = {p: group for p, group in groups.items() if not self.weights.keys().isdisjoint(group.sources)}
        self.linears = {p: group for p, group in packed.items() if self._alone(group)}
        self.experts = {p: group for p, group in packed.items() if p not in self.linears}
        with torch.device("cpu"):
            self.places = {p: self._places(group) for p, group in self.experts.items()}
        self.ties = {alias: owner for alias, owner in ties(model, groups).items() if owner in packed}
        # Parameters tied to a packed one are tied here, not by transformers.
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        for alias, kept in [*tied.items()]:
            if alias in self.ties or not packed.keys().isdisjoint((alias, kept)):
                del tied[alias]
        self._hollow()

    def _alone(self, group: Group) -> bool:
        """Whether the group is one tensor that becomes the weight of a Linear, Embedding or Conv1D."""
        from transformers.pytorch_utils import Conv1D

        path, _, attribute = group.parameter.rpartition(".")
        module = self.module_at(path)
        return not group.patterns and attribute == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D)

    def _places(self, group: Group) -> tuple[list[list[Piece]], bool]:
        """(for each expert the matrices on disk that its rows consist of, whether rows are the last dimension)."""
        matrices: list[tuple[str, int | None, int]] = []
        numbers: dict[str, torch.Tensor] = {}
        for name in group.sources:
            weight = self._weight(name)
            stack = [None] if weight.experts is None else [*range(weight.experts)]
            first = torch.arange(len(matrices), len(matrices) + len(stack)) * _MATRIX
            rows = (first[:, None] + torch.arange(weight.rows))[..., None]
            numbers[name] = as_matrix(weight, rows[0] if weight.experts is None else rows)
            matrices += [(name, index, weight.rows) for index in stack]
        made = self.mapping.convert(group, numbers.__getitem__)
        stacked = made.get(group.parameter, torch.empty(0))
        if len(made) != 1 or stacked.dim() != 3 or 1 not in stacked.shape[1:]:
            raise self._wrong(group)
        found: list[list[Piece]] = []
        for held in stacked.flatten(1).tolist():
            parts, at = [], 0
            while at < len(held):
                name, index, count = matrices[held[at] // _MATRIX]
                if held[at] % _MATRIX or held[at : at + count] != [*range(held[at], held[at] + count)]:
                    raise self._wrong(group)
                parts.append((name, index))
                at += count
            found.append(parts)
        return found, stacked.shape[-1] != 1

    def _weight(self, name: str) -> Weight:
        if name in self.weights:
            return self.weights[name][0]
        logical = self.dense_view.logical[name]
        return Weight(name, logical.dtype, logical.shape, transposed=logical.transposed)

    def _wrong(self, group: Group) -> InputError:
        got = "rows that transformers takes apart or puts in another order while it loads"
        return InputError(f"'{group.sources[0]}'", f"whole matrices of {group.parameter}", got, "unpack with to=dense")

    def module_at(self, path: str) -> nn.Module:
        """The module at a path."""
        found: nn.Module = self.model.get_submodule(path)
        return found

    def _hollow(self) -> None:
        for name in (*self.linears, *self.ties):
            source = self.linears[self.ties.get(name, name)].sources[0]
            module: Any = self.module_at(name.rpartition(".")[0])
            scheme = self.weights[source][1].scheme
            hollow(module, scheme is not None and bool(scheme.inputs or scheme.hadamard))
            module.awaited_bytes = self._nbytes(source) if name in self.linears else 0
        stacks: dict[str, list[str]] = defaultdict(list)
        for name in self.experts:
            path, _, attribute = name.rpartition(".")
            stacks[path].append(attribute)
        for path, attributes in stacks.items():
            module = self.module_at(path)
            hollow_experts(module, attributes)
            sources = (source for attribute in attributes for source in self.experts[f"{path}.{attribute}"].sources)
            module.awaited_bytes = sum(map(self._nbytes, sources))

    def _nbytes(self, name: str) -> int:
        """Bytes of a packed weight in memory."""
        if name not in self.weights:
            return self._weight(name).numel * self.dtype.itemsize
        fmt = self.dense_view.format if self.native else Native()
        assert isinstance(fmt, Native)
        return fmt.memory_bytes(*self.weights[name])

    def readers(self, name: str) -> list[Any]:
        """The modules that use a packed parameter, including tied ones."""
        names = [name, *(alias for alias, owner in self.ties.items() if owner == name)]
        return [self.module_at(path.rpartition(".")[0]) for path in names]

    def uses(self, parameter: str) -> tuple[bool, bool]:
        """(whether a module looks rows of a parameter up, whether one multiplies by it)."""
        embeddings = [isinstance(module, nn.Embedding) for module in self.readers(parameter)]
        return any(embeddings), not all(embeddings)

    def tensors(self) -> list[str]:
        """The tensors on disk of all packed parameters, including the few that are not packed themselves."""
        sources = [source for group in (*self.linears.values(), *self.experts.values()) for source in group.sources]
        packed = {name: [spec.name for spec in self.dense_view.specs(name)] for name in sources if name in self.weights}
        return [tensor for name in sources for tensor in packed.get(name, [name])]

    def fill(self) -> None:
        """Reads every packed weight and gives it to its modules."""
        paths = {module: path for path, module in self.model.named_modules()}
        for name in self.linears:
            modules = self.readers(name)
            weights: dict[Where, nn.Module] = {}
            for module in modules:
                # Tied modules on the same device share the weight.
                place = where(self.model, paths[module])
                if place not in weights:
                    weights[place] = offloaded(partial(self._linear, name, place), place)
                module.fill(weights[place])
        split = {}
        for name in self.experts:
            path, _, attribute = name.rpartition(".")
            module, place = self.module_at(path), where(self.model, path)
            assert isinstance(module, PackedExperts)
            experts, turned = self.places[name]
            found, places = stacks(experts, self.kind)
            filled = [offloaded(partial(self._stack, matrices, place), place) for matrices in found]
            module.fill_experts(attribute, filled, places, turned, place.device)
            if (products := len(module.runs[attribute])) > 1:
                split[name] = f"experts of {products} kinds, which are multiplied by one kind after the other"
        for note in counted("experts", split):
            _LOG.info("%d stacks, such as %s: %s", note.count, note.names[0], note.reason)
        self._last = None
        trim_memory()

    def kind(self, name: str) -> Kind:
        """The properties of a weight on disk that all matrices of a stack must share."""
        weight = self._weight(name)
        if name not in self.weights:
            return Kind(None, weight.rows, weight.columns)
        native = self.dense_view.specs(name) if self.native else []
        parts = (weight.dtype, *((spec.dtype, spec.shape[weight.experts is not None :]) for spec in native))
        return Kind(self.weights[name][1], weight.rows, weight.columns, parts)

    def _linear(self, parameter: str, place: Where) -> nn.Module:
        """Loads the weight of a parameter."""
        name, (looked_up, multiplied) = self.linears[parameter].sources[0], self.uses(parameter)
        packed, turned = self._matrix(name, None, place), self._weight(name).transposed
        return PackedWeight(packed, self.dtype, turned, looked_up, self.backend, place.device, multiplied)

    def _stack(self, matrices: list[Matrix], place: Where) -> nn.Module:
        """Loads matrices as a stack."""
        if matrices[0][0][0] not in self.weights:
            values = torch.stack([torch.cat([self._dense(*piece) for piece in pieces]) for pieces in matrices])
            return DenseWeight(values.to(place.first))

        def read(number: int) -> Packed:
            return joined([self._matrix(*piece, place) for piece in matrices[number]])

        weight = PackedWeight(Stack(len(matrices), read), self.dtype, backend=self.backend, device=place.device)
        weight.sources = len({name for pieces in matrices for name, _ in pieces})
        return weight

    def _dense(self, name: str, index: int | None) -> torch.Tensor:
        """Loads a matrix that is not packed."""
        dense = as_matrix(self._weight(name), self.dense_view.dense(name)).to(self.dtype)
        return dense if index is None else dense[index]

    def _matrix(self, name: str, index: int | None, place: Where) -> Packed:
        """Loads a matrix, or one of a stack, that is packed on disk, or packs it while loading."""
        weight, state = self.weights[name]
        if not self.native:
            if self._last is None or self._last[0] != name:
                q = self.dense_view.qtensor(name)
                assert q is not None
                self._last = name, Packed(state, weight.rows, weight.columns, pack(q))
            packed = self._last[1] if index is None else self._last[1].expert(index)
            return replace(packed, parts={part: tensor.to(place.first) for part, tensor in packed.parts.items()})
        parts = {}
        for spec in self.dense_view.specs(name):
            read = self.dense_view.checkpoint.read
            part = read(spec.name) if index is None else read(spec.name, index, index + 1)[0]
            parts[spec.name.rpartition(".")[2]] = part
        if state.scheme is not None:
            parts = whole(parts, state.scheme, weight.columns)
        return Packed(state, weight.rows, weight.columns, {name: part.to(place.first) for name, part in parts.items()})
