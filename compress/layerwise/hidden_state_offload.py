"""Hidden state offload: moves states beyond a budget to host memory or a file.

The hidden states of a batch that is paused at a block are referenced by the frames of transformers' own forward, which cannot
be made to drop them. So the storage under the tensors is emptied in place and filled again before the block needs it; all
references stay valid. Without a GPU, states go to files; on a GPU they go to the host's memory and, beyond the same budget
there, to files.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from compress.device import CPU
from compress.errors import MachineError
from compress.layerwise.stepwise import Call

_PREFIX = ".compress-states."
_SMALLEST = 1 << 16
"""Bytes below which a tensor is not worth a write."""


class HiddenStateOffload:
    """One file per batch under `folder`, written anew at every block; up to `budget_bytes` of states are not moved."""

    def __init__(self, folder: Path, rank: int, budget_bytes: int, device: torch.device = CPU) -> None:
        self.folder, self.rank, self.device = folder, rank, device
        self.budget = self.host_budget = budget_bytes
        self._parked: dict[object, list[tuple[torch.UntypedStorage, int]]] = {}
        self._resident: dict[object, int] = {}
        self._files: dict[object, Path] = {}
        self._hosted: dict[object, list[torch.Tensor]] = {}

    def park(self, owner: object, call: Call, unchanged: bool = False) -> None:
        """Empties the arguments of `owner`'s call if they exceed the budget of states in memory. Raises MachineError.

        `unchanged`: the call is the one that was parked before, so a copy that was written still holds.
        """
        if unchanged and owner in self._resident:
            return
        storages = _storages(call)
        nbytes = sum(storage.nbytes() for storage in storages)
        self._resident.pop(owner, None)
        if sum(self._resident.values()) + nbytes <= self.budget:
            self._resident[owner] = nbytes
            return
        if not unchanged:
            self._hosted.pop(owner, None)
            if self.device == CPU:
                self._write(owner, nbytes, [_bytes(storage) for storage in storages])
            else:
                self._to_host(owner, nbytes, storages)
        self._parked[owner] = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def _write(self, owner: object, nbytes: int, parts: list[memoryview]) -> None:
        file = self._files.setdefault(owner, self.folder / f"{_PREFIX}{self.rank}.{len(self._files)}")
        try:
            with open(file, "wb") as stream:
                for part in parts:
                    stream.write(part)
        except OSError as error:
            do = "free some space there, or calibrate on fewer tokens"
            got = error.strerror or str(error)
            raise MachineError(str(self.folder), f"{nbytes:,} bytes for hidden states", got, do) from None

    def _to_host(self, owner: object, nbytes: int, storages: list[torch.UntypedStorage]) -> None:
        """Copies storages on the device to the host's memory or, if that budget is used up, to a file."""
        if sum(part.nbytes for parts in self._hosted.values() for part in parts) + nbytes <= self.host_budget:
            self._hosted[owner] = [self._seen(storage).cpu() for storage in storages]
        else:
            # `parts` keeps the copies alive while their raw memory is written.
            parts = [self._seen(storage).cpu() for storage in storages]
            self._write(owner, nbytes, [_bytes(part.untyped_storage()) for part in parts])

    def _seen(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The bytes of a storage on the device, as a tensor."""
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)

    def fetch(self, owner: object) -> None:
        """Fills the emptied arguments of `owner` again."""
        if owner not in self._parked:
            return
        parts = self._parked.pop(owner)
        for storage, nbytes in parts:
            storage.resize_(nbytes)
        if owner in self._hosted:
            for (storage, _), part in zip(parts, self._hosted[owner], strict=True):
                self._seen(storage).copy_(part)
            return
        with open(self._files[owner], "rb") as stream:
            for storage, nbytes in parts:
                target = storage if self.device == CPU else torch.UntypedStorage(nbytes)
                assert stream.readinto(_bytes(target)) == nbytes
                if target is not storage:
                    self._seen(storage).copy_(torch.empty(0, dtype=torch.uint8).set_(target))

    def clear(self) -> None:
        """Removes the files, and the copies in host memory."""
        self._hosted.clear()
        for file in self.folder.glob(f"{_PREFIX}{self.rank}.*"):
            file.unlink()


def _storages(call: Call) -> list[torch.UntypedStorage]:
    """The storages of a block's float arguments, each once."""
    given: list[Any] = [*call.args, *call.kwargs.values()]
    tensors = [value for value in given if isinstance(value, torch.Tensor) and value.is_floating_point()]
    found = {tensor.data_ptr(): tensor.untyped_storage() for tensor in tensors}
    # Storages that cannot be resized are weights read from the checkpoint, passed as arguments.
    unique = {storage.data_ptr(): storage for storage in found.values()}.values()
    return [storage for storage in unique if storage.nbytes() >= _SMALLEST and storage.resizable()]


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    # Not via numpy: a storage that numpy has seen can no longer be resized.
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
