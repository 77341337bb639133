"""Artifact: a packed directory as a model that runs, with no dense copy.

transformers builds the model and loads what is dense; hf.py hooks in before and after. Before, modules whose tensors on disk
are packed become shells without a weight (kernels/native/modules.py); afterwards they get their parts, each in the form that
its backend wants. A stacked parameter of experts is told apart into the matrices on disk that make it up, by running
transformers' own conversion on their row numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.checkpoint import CANONICAL, NATIVE, Checkpoint, open_checkpoint
from compress.classes import model_class
from compress.errors import InputError
from compress.facts import Weight
from compress.foreign import method_of
from compress.kernels.native.modules import DenseWeight, PackedExperts, PackedWeight, Place, hollow, hollow_experts
from compress.kernels.native.packed import Packed
from compress.mapping import Group, Mapping
from compress.meaning import Meaning
from compress.model import ties
from compress.qtensor import as_matrix
from compress.writer import trim_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MATRIX = 1 << 40
"""More rows than a matrix has: they are numbered from a multiple of it."""


def load(path: str | Path, dtype: str = "auto", backend: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """The model of an artifact in the native format, ready to run, in `dtype` (auto: that of config.json).

    `backend` runs all weights; without it each has the fastest that takes it. Raises InputError for a directory that is no such
    artifact, UsageError for a backend that refuses.
    """
    from compress import hf  # noqa: F401  (registers the quantizer)

    checkpoint = open_checkpoint(Path(path))
    refuse_other(checkpoint)
    cls, config = model_class(checkpoint)
    config.quantization_config = {**checkpoint.config["quantization_config"], "backend": backend}
    loader: Any = cls
    model: PreTrainedModel = loader.from_pretrained(path, config=config, dtype=dtype, device_map=device, local_files_only=True)
    return model


def refuse_other(checkpoint: Checkpoint) -> None:
    """Raises InputError for a checkpoint that is not in the native format."""
    method = method_of(checkpoint)
    if method != NATIVE:
        got = {None: "a dense one", CANONICAL: "one in codes that are not packed"}.get(method, f"one packed as {method}")
        raise InputError(str(checkpoint.path), "an artifact in the native format", got, "make one with pack(format=native)")


def backends(model: nn.Module) -> Counter[str]:
    """How many packed weights each backend runs."""
    return Counter(module.backend for module in model.modules() if isinstance(module, PackedWeight))


class Filling:
    """What of a model on the meta device comes packed from a checkpoint, and how it gets there."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, backend: str | None = None) -> None:
        """Makes shells of the modules. Raises InputError for what cannot be put into `model`."""
        refuse_other(checkpoint)
        self.model: Any = model
        self.dtype, self.backend = dtype, backend
        self.meaning = Meaning(checkpoint)
        self.mapping = Mapping(model)
        groups = {group.parameter: group for group in self.mapping.groups(self.meaning.logical)}
        packed = {p: group for p, group in groups.items() if not self.meaning.weights.keys().isdisjoint(group.sources)}
        self.linears = {p: group for p, group in packed.items() if self._alone(group)}
        self.experts = {p: group for p, group in packed.items() if p not in self.linears}
        with torch.device("cpu"):
            self.places = {p: self._places(group) for p, group in self.experts.items()}
        self.ties = {alias: owner for alias, owner in ties(model, groups).items() if owner in packed}
        # What is tied to something packed is no longer for transformers to tie.
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        for alias, kept in [*tied.items()]:
            if alias in self.ties or not packed.keys().isdisjoint((alias, kept)):
                del tied[alias]
        self._hollow()

    def _alone(self, group: Group) -> bool:
        """Whether one tensor becomes the weight of a module that multiplies by it or looks its rows up."""
        from transformers.pytorch_utils import Conv1D

        path, _, attribute = group.parameter.rpartition(".")
        module = self.module_at(path)
        return not group.patterns and attribute == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D)

    def _places(self, group: Group) -> tuple[list[list[tuple[str, int | None]]], bool]:
        """For each expert the tensors, or the matrices of a stack, that its rows are; and whether rows lie last."""
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
        found: list[list[tuple[str, int | None]]] = []
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
        if name in self.meaning.weights:
            return self.meaning.weights[name][0]
        logical = self.meaning.logical[name]
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
            _, state = self.meaning.weights[self.linears[self.ties.get(name, name)].sources[0]]
            assert state.scheme is not None
            hollow(self.module_at(name.rpartition(".")[0]), state.scheme)
        stacks: dict[str, list[str]] = defaultdict(list)
        for name in self.experts:
            path, _, attribute = name.rpartition(".")
            stacks[path].append(attribute)
        for path, attributes in stacks.items():
            hollow_experts(self.module_at(path), attributes)

    def fill(self) -> None:
        """Reads every packed weight and gives it to its modules."""
        shared: dict[str, list[str]] = defaultdict(list)
        for alias, owner in self.ties.items():
            shared[owner].append(alias)
        for name, group in self.linears.items():
            modules: list[Any] = [self.module_at(p.rpartition(".")[0]) for p in (name, *shared[name])]
            looked_up = any(isinstance(module, nn.Embedding) for module in modules)
            weight = self._read(group.sources[0], looked_up)
            for module in modules:
                module.fill(weight)
        for name in self.experts:
            path, _, attribute = name.rpartition(".")
            experts, turned = self.places[name]
            sources = list(dict.fromkeys(source for parts in experts for source, _ in parts))
            places: list[list[Place]] = [[(sources.index(source), index) for source, index in parts] for parts in experts]
            module = self.module_at(path)
            assert isinstance(module, PackedExperts)
            module.fill_experts(attribute, [self._read(source) for source in sources], places, turned)
        trim_memory()

    def _read(self, name: str, looked_up: bool = False) -> nn.Module:
        """One weight from disk, where the model is."""
        device = self.model.device
        if name not in self.meaning.weights:
            dense = as_matrix(self._weight(name), self.meaning.dense(name))
            return DenseWeight(dense.to(device, self.dtype).contiguous())
        weight, state = self.meaning.weights[name]
        specs, read = self.meaning.specs(name), self.meaning.checkpoint.read
        parts = {spec.name.rpartition(".")[2]: read(spec.name).to(device) for spec in specs}
        packed = Packed(state, weight.rows, weight.columns, parts)
        turned = weight.transposed and weight.experts is None
        return PackedWeight(packed, self.dtype, turned, looked_up, self.backend)
