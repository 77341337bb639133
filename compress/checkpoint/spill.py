"""Spill: stores tensors by name, large ones in files and small ones in memory."""

from __future__ import annotations

import shutil
from collections.abc import Hashable
from pathlib import Path

import torch

from compress.errors import MachineError

_SMALLEST = 1 << 16
"""Bytes below which a tensor stays in memory."""


class Spill:
    """A store in `folder`, which it owns: emptied when the store is made, removed when it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._held: dict[Hashable, torch.Tensor | tuple[Path, torch.Size, torch.dtype, torch.device]] = {}
        self._files = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Stores a copy under a name, replacing what was there. Raises MachineError."""
        self.drop(key)
        if tensor.nbytes < _SMALLEST:
            self._held[key] = tensor.detach().clone()
            return
        self._files += 1
        file = self.folder / str(self._files)
        try:
            file.write_bytes(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            do = "free some space there, or calibrate on fewer tokens"
            expected = f"{tensor.nbytes:,} bytes for hidden states"
            raise MachineError(str(self.folder), expected, error.strerror or str(error), do) from None
        self._held[key] = file, tensor.shape, tensor.dtype, tensor.device

    def add(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Adds a tensor to the one of that name, or stores it if there is none."""
        self.put(key, self.get(key).add_(tensor) if key in self else tensor)

    def get(self, key: Hashable) -> torch.Tensor:
        """A copy of the tensor of that name, on the device that it came from."""
        held = self._held[key]
        if isinstance(held, torch.Tensor):
            return held.clone()
        file, shape, dtype, device = held
        data = bytearray(file.stat().st_size)
        with open(file, "rb") as stream:
            stream.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(shape).to(device)

    def drop(self, key: Hashable) -> None:
        """Removes the tensor of that name, if there is one."""
        held = self._held.pop(key, None)
        if held is not None and not isinstance(held, torch.Tensor):
            held[0].unlink()

    def close(self) -> None:
        """Removes the files."""
        self._held.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
