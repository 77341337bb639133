"""Device map: where packed weights are used and kept, and how they get there.

accelerate deals modules out and moves what it finds in them. Packed weights come later, so they are put where their modules
were sent; what is used on one device and kept on another, or on disk, is fetched by accelerate's own hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Where:
    """A place for a weight."""

    device: torch.device
    """Where it is used."""
    kept: str = ""
    """cpu or disk, where it is between its uses; empty: where it is used."""

    @property
    def first(self) -> torch.device:
        """Where it is read to."""
        return torch.device("cpu") if self.kept else self.device


def where(model: Any, path: str) -> Where:
    """The place of the module at a path, by the device map that a model was loaded with."""
    hook = getattr(model, "_hf_hook", None)
    if hook is None:
        return Where(model.device)
    dealt, main = model.hf_device_map, torch.device(hook.execution_device)
    while path and path not in dealt:
        path = path.rpartition(".")[0]
    place = dealt.get(path, main)
    if str(place) == "disk" or (str(place) == "cpu" and main.type not in ("cpu", "mps")):
        return Where(main, str(place))
    return Where(torch.device(place))


def offloaded(make: Callable[[], nn.Module], place: Where) -> nn.Module:
    """What `make` makes on the CPU; kept on disk, it is made anew for every use."""
    weight = make()
    if place.kept:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        kept = _Made(make) if place.kept == "disk" else None
        add_hook_to_module(weight, AlignDevicesHook(place.device, offload=True, offload_buffers=True, weights_map=kept))
    return weight


class _Made(Mapping[str, torch.Tensor]):
    """Tensors of a module by name, each handed out once before it is made anew."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make, self._left = make, dict[str, torch.Tensor]()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._left:
            self._left = self._make().state_dict()
        return self._left.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._make().state_dict())

    def __len__(self) -> int:
        return len([*self])
