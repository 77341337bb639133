"""Meta model: a model on the meta device whose parts are loaded and released.

A block, the embedding or the head is in memory while it is used; the small rest (norms, positions, projections
between towers) always is. Parameters are read through transformers' own mapping, from a checkpoint in any state;
buffers that no checkpoint holds come from transformers' own initialisation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import nn

from compress.architecture import weight_map
from compress.architecture.experts import IMPLEMENTATION, register
from compress.architecture.hf_mapping import Group, Mapping
from compress.architecture.stacks import stacks
from compress.device import CPU
from compress.layerwise.dense_view import DenseView


@dataclass(frozen=True)
class Block:
    """One block of a stack: its path in the model."""

    stack: str
    index: int
    path: str


class MetaModel:
    """`module` is transformers' model in eval mode, computing in `dtype` on `device`; its blocks are not loaded at first."""

    def __init__(self, dense_view: DenseView, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.dense_view, self.dtype, self.device = dense_view, dtype, device
        with _default_dtype(dtype):
            self.module: Any = weight_map.meta_model(dense_view.checkpoint)
        self.model = dense_view.resolve(self.module)
        self.mapping = Mapping(self.module)
        self._groups, self._aliases = self._by_parameter()
        self._made: dict[str, list[str]] = defaultdict(list)
        """Tensor on disk -> the parameters that it becomes, or becomes part of."""
        for parameter, group in self._groups.items():
            for name in group.sources:
                self._made[name].append(parameter)
        self._overrides: dict[str, torch.Tensor] = {}
        self.blocks = [
            Block(stack, index, f"{path}.{index}")
            for path, stack, length in stacks(self.module)
            for index in range(length)
        ]  # fmt: skip
        for part in self.module.modules():
            part.requires_grad_(False)
            config: Any = getattr(part, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = IMPLEMENTATION
        register()
        self._keep_fp32 = self._fp32_patterns()
        self._initialise()
        self._rest()

    def _by_parameter(self) -> tuple[dict[str, Group], dict[str, str]]:
        """(parameter -> its group of tensors on disk, tied parameter without tensors -> the parameter that has them)."""

        def empty(name: str) -> torch.Tensor:
            return torch.empty(self.dense_view.logical[name].shape, device="meta")

        groups: dict[str, Group] = {}
        for group in self.mapping.groups(self.dense_view.logical):
            groups.update(dict.fromkeys(self.mapping.convert(group, empty), group))
        tied = dict(getattr(self.module, "all_tied_weights_keys", {}) or {})
        pairs = [*tied.items(), *((kept, alias) for alias, kept in tied.items())]
        aliases = {one: other for one, other in pairs if one not in groups and other in groups}
        # All names of a tied tensor map to one name, which may itself have no tensor on disk.
        aliases.update({one: aliases[other] for one, other in pairs if one not in {*groups, *aliases} and other in aliases})
        return groups, aliases

    def _fp32_patterns(self) -> list[re.Pattern[str]]:
        """Patterns of parameters that transformers keeps in fp32 whatever the dtype, by its own lists."""
        words: set[str] = set(getattr(self.module, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype is torch.float16:
            words |= set(getattr(self.module, "_keep_in_fp32_modules", None) or ())
        return [re.compile(rf"(^|\.){word}($|\.)") for word in words]

    def _initialise(self) -> None:
        """Initialises buffers, and parameters that may be missing on disk, as transformers does."""
        from transformers import PreTrainedModel

        parts = [*self.module.named_buffers(), *self.module.named_parameters()]
        missing = [(name, tensor) for name, tensor in parts if name not in self._groups and name not in self._aliases]
        owners = sorted({name.rpartition(".")[0] for name, _ in missing})
        for name, tensor in missing:
            self._set(name, torch.empty_like(tensor, device="cpu"))
        for path in owners:
            steps = path.split(".") if path else []
            chain = [self.module.get_submodule(".".join(steps[:n])) for n in range(len(steps) + 1)]
            nearest = [part for part in chain if isinstance(part, PreTrainedModel)][-1]
            with torch.no_grad():
                nearest._init_weights(chain[-1])
        # Computed on the CPU, so that the numbers are the same on every device.
        for name, _ in missing if self.device != CPU else ():
            path, _, attribute = name.rpartition(".")
            self._set(name, getattr(self.module.get_submodule(path), attribute).to(self.device))

    def _rest(self) -> None:
        """Loads what belongs to no block, except embeddings and the head, which are loaded when they are called."""
        inside = tuple(f"{block.path}." for block in self.blocks)
        head = self.module.get_output_embeddings()
        self._visiting: set[str] = set()
        self._lock = Lock()
        self.lazy: list[str] = []
        for path, part in self.module.named_modules():
            if not part._parameters or f"{path}.".startswith(inside):
                continue
            if isinstance(part, nn.Embedding) or part is head:
                self.lazy.append(path)
                self._hollow(path)
                part.register_forward_pre_hook(lambda _, __, path=path: self._visit(path))
        lazy = tuple(f"{path}." for path in self.lazy)
        for parameter in (*self._groups, *self._aliases):
            if not parameter.startswith((*inside, *lazy)):
                self._load_parameter(parameter)

    def _visit(self, path: str) -> None:
        with self._lock:
            if path not in self._visiting:
                self.load(path)
                self._visiting.add(path)

    def release_visitors(self) -> None:
        """Releases embeddings and head; they are loaded again when they are called again."""
        for path in self._visiting:
            self._hollow(path)
        self._visiting.clear()

    def _hollow(self, path: str) -> None:
        """A NaN of the right device and shape, without memory: some code asks a weight for its device before the call."""
        part = self.module.get_submodule(path)
        for name, old in part._parameters.items():
            if old is not None:
                self._set(f"{path}.{name}", torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(old.shape))

    def parameters_of(self, path: str) -> list[str]:
        """Parameters and buffers under a path that come from disk."""
        return [name for name in (*self._groups, *self._aliases) if name.startswith(f"{path}.")]

    def load(self, path: str, spread: Callable[..., Iterable[Any]] = map) -> None:
        """Loads everything under a path; `spread` may be the map of a pool."""
        # Loading one parameter of a group loads all of them; tied parameters are loaded separately.
        first = {(id(self.group_of(p)), p if p in self._aliases else ""): p for p in reversed(self.parameters_of(path))}
        for _ in spread(lambda parameter: self._load_parameter(parameter, f"{path}."), reversed(first.values())):
            pass

    def _load_parameter(self, parameter: str, within: str = "") -> None:
        """Loads a parameter, and the others of its group that lie under the path `within`."""
        own = self._aliases.get(parameter, parameter)
        converted = self.mapping.convert(self._groups[own], lambda name: self._read(name, parameter))
        if own != parameter:
            converted = {parameter: converted[own]}
        for name, value in converted.items():
            if name.startswith(within):
                self._set(name, value.contiguous())

    def _read(self, name: str, parameter: str) -> torch.Tensor:
        value = (self._overrides[name] if name in self._overrides else self.dense_view.dense(name)).to(self.device)
        if not value.is_floating_point():
            return value
        fp32 = any(pattern.search(parameter) for pattern in self._keep_fp32)
        return value.to(torch.float32 if fp32 else self.dtype)

    def _set(self, name: str, value: torch.Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        part = self.module.get_submodule(path)
        if attribute in part._parameters:
            part._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        else:
            part._buffers[attribute] = value

    def stored(self, name: str) -> torch.Tensor:
        """A weight in its stored shape and dtype, on the device."""
        return self.dense_view.dense(name).to(self.device)

    def replace(self, weights: dict[str, torch.Tensor]) -> None:
        """Replaces weights of the loaded block by new values in stored shape and dtype."""
        self._overrides.update(weights)
        # The first parameter of each group; loading it loads the others.
        for parameter in dict.fromkeys(made[0] for name in weights if (made := self._made.get(name))):
            self._load_parameter(parameter, "")
            # A new value is kept only while weights that it is fused with have not been replaced yet.
            if len(sources := self._groups[parameter].sources) == 1:
                del self._overrides[sources[0]]

    def release(self, path: str) -> None:
        """Releases everything under a path."""
        for parameter in self.parameters_of(path):
            part = self.module.get_submodule(parameter.rpartition(".")[0])
            attribute = parameter.rpartition(".")[2]
            store = part._parameters if attribute in part._parameters else part._buffers
            old = store[attribute]
            empty = torch.empty_like(old, device="meta")
            store[attribute] = nn.Parameter(empty, requires_grad=False) if store is part._parameters else empty
        self._overrides.clear()

    def readers(self, name: str) -> list[str]:
        """Paths of the modules that a tensor on disk becomes part of; several if it is split while loading."""
        made = (parameter for parameter in self.made_of(name) if parameter in self._groups)
        return sorted({parameter.rpartition(".")[0] for parameter in made})

    def made_of(self, name: str) -> list[str]:
        """The parameters that a tensor on disk becomes, or becomes part of; tied ones included."""
        made = self._made.get(name, [])
        return made + [alias for alias, parameter in self._aliases.items() if parameter in made]

    def group_of(self, parameter: str) -> Group:
        """The group of tensors that a parameter is made of."""
        return self._groups[self._aliases.get(parameter, parameter)]

    def module_at(self, path: str) -> nn.Module:
        """The module at a path."""
        part = self.module.get_submodule(path)
        assert isinstance(part, nn.Module)
        return part


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
