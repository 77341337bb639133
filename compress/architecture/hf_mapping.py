"""HF mapping: which tensors on disk become which parameters of transformers.

transformers renames, fuses, splits and transposes tensors while it loads. A Group is the smallest set of tensors
that it handles together; most have one source and one parameter. The same code maps names (without data) and fills the
meta model (with data).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Group:
    """Tensors on disk that load together. `patterns` is empty where one tensor becomes one parameter as it is."""

    parameter: str
    """The parameter's path; the first one where there are several."""
    sources: tuple[str, ...]
    patterns: tuple[str, ...] = ()


class Mapping:
    """transformers' own mapping for one model, which may be on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model: Any = model
        self.state = model.state_dict()
        entries = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def place(self, name: str) -> tuple[str, str | None]:
        """(parameter, or what it would be called, pattern of the conversion) for a tensor on disk."""
        from transformers.core_model_loading import rename_source_key as rename

        prefix = self.model.base_model_prefix
        parameter, pattern = rename(name, self._renamings, self._converters, prefix, self.state)
        if parameter not in self.state and name in self.state:
            parameter, pattern = rename(name, [], [], prefix, self.state)
        return parameter, pattern

    def groups(self, names: Iterable[str]) -> list[Group]:
        """The groups that `names` form, in loading order; names without a parameter are left out."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(names, key=dot_natural_key):
            parameter, pattern = self.place(name)
            if parameter not in self.state:
                continue
            if pattern is None:
                found[parameter] = [(name, None)]
            else:
                found.setdefault(parameter, []).append((name, pattern))
        return [
            Group(parameter, tuple(name for name, _ in parts), tuple(pattern for _, pattern in parts if pattern is not None))
            for parameter, parts in found.items()
        ]

    def operations(self, group: Group) -> list[Any]:
        """transformers' operations on a group, and the patterns they are for."""
        return list(self._by_pattern[group.patterns[0]].operations) if group.patterns else []

    def only_weights(self, group: Group) -> bool:
        """Whether every pattern of the conversion ends in `.weight`."""
        return all(source.endswith(".weight") for source in self._by_pattern[group.patterns[0]].source_patterns)

    def convert(self, group: Group, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that a group's tensors become. Raises what torch raises for shapes that do not fit."""
        if not group.patterns:
            return {group.parameter: read(group.sources[0])}
        converter = copy.deepcopy(self._by_pattern[group.patterns[0]])
        for name, pattern in zip(group.sources, group.patterns, strict=True):
            converter.add_tensor(group.parameter, name, pattern, read(name))
        results = converter.convert(group.parameter, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
