"""Device map: places packed weights on the devices that accelerate chose.

accelerate assigns modules to devices and moves the tensors in them. Packed weights are loaded later, so they are put on the
device of their module; a weight that is used on one device and kept on another, or on disk, is moved by accelerate's own hook.
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
    """The device on which it is used."""
    kept: str = ""
    """Where it is kept between uses: cpu, disk, or empty for the device on which it is used."""

    @property
    def first(self) -> torch.device:
        """The device to which it is loaded first."""
        return torch.device("cpu") if self.kept else self.device


def where(model: Any, path: str) -> Where:
    """The place of the module at a path, by the model's device map."""
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
    """The module that `make` creates, with a hook that moves it if it is kept elsewhere; on disk it is remade for every use."""
    weight = make()
    if place.kept:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        kept = _Made(make) if place.kept == "disk" else None
        add_hook_to_module(weight, AlignDevicesHook(place.device, offload=True, offload_buffers=True, weights_map=kept))
    return weight


class _Made(Mapping[str, torch.Tensor]):
    """Tensors of a module by name; the module is made anew once a tensor is requested for the second time."""

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
