"""Hidden state offload: those beyond a budget wait in host memory or a file.

A batch that waits at a block is held by the frames of transformers' own forward, which cannot be asked to let go. So
the storage under its tensors is emptied in place and filled again before the block needs it: whoever holds
the tensor holds it still. States of the host wait in files; those of a GPU in the host's memory, and in files beyond the same
budget there.
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
    """One file per batch under `folder`, written anew at every block; `budget_bytes` of states stay where they are."""

    def __init__(self, folder: Path, rank: int, budget_bytes: int, device: torch.device = CPU) -> None:
        self.folder, self.rank, self.device = folder, rank, device
        self.budget = self.host_budget = budget_bytes
        self._parked: dict[object, list[tuple[torch.UntypedStorage, int]]] = {}
        self._resident: dict[object, int] = {}
        self._files: dict[object, Path] = {}
        self._hosted: dict[object, list[torch.Tensor]] = {}

    def park(self, who: object, call: Call, unchanged: bool = False) -> None:
        """Empties what `who` holds, if the batches in memory already use up the budget. Raises MachineError.

        `unchanged`: it was parked with the same values before, or never had to be.
        """
        if unchanged and who in self._resident:
            return
        storages = _storages(call)
        nbytes = sum(storage.nbytes() for storage in storages)
        self._resident.pop(who, None)
        if sum(self._resident.values()) + nbytes <= self.budget:
            self._resident[who] = nbytes
            return
        if not unchanged:
            self._hosted.pop(who, None)
            if self.device == CPU:
                self._write(who, nbytes, [_bytes(storage) for storage in storages])
            else:
                self._to_host(who, nbytes, storages)
        self._parked[who] = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def _write(self, who: object, nbytes: int, parts: list[memoryview]) -> None:
        file = self._files.setdefault(who, self.folder / f"{_PREFIX}{self.rank}.{len(self._files)}")
        try:
            with open(file, "wb") as stream:
                for part in parts:
                    stream.write(part)
        except OSError as error:
            do = "free some space there, or calibrate on fewer tokens"
            got = error.strerror or str(error)
            raise MachineError(str(self.folder), f"{nbytes:,} bytes for hidden states", got, do) from None

    def _to_host(self, who: object, nbytes: int, storages: list[torch.UntypedStorage]) -> None:
        """Copies what lies on the device to the host's memory or, where that is used up, to a file."""
        if sum(part.nbytes for parts in self._hosted.values() for part in parts) + nbytes <= self.host_budget:
            self._hosted[who] = [self._seen(storage).cpu() for storage in storages]
        else:
            # Held until they are written: what is written looks at their memory alone.
            parts = [self._seen(storage).cpu() for storage in storages]
            self._write(who, nbytes, [_bytes(part.untyped_storage()) for part in parts])

    def _seen(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The bytes of a storage on the device, as a tensor."""
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)

    def fetch(self, who: object) -> None:
        """Fills what `who` holds again, if it was emptied."""
        if who not in self._parked:
            return
        parts = self._parked.pop(who)
        for storage, nbytes in parts:
            storage.resize_(nbytes)
        if who in self._hosted:
            for (storage, _), part in zip(parts, self._hosted[who], strict=True):
                self._seen(storage).copy_(part)
            return
        with open(self._files[who], "rb") as stream:
            for storage, nbytes in parts:
                target = storage if self.device == CPU else torch.UntypedStorage(nbytes)
                assert stream.readinto(_bytes(target)) == nbytes
                if target is not storage:
                    self._seen(storage).copy_(torch.empty(0, dtype=torch.uint8).set_(target))

    def clear(self) -> None:
        """Removes the files, and what the host holds."""
        self._hosted.clear()
        for file in self.folder.glob(f"{_PREFIX}{self.rank}.*"):
            file.unlink()


def _storages(call: Call) -> list[torch.UntypedStorage]:
    """The memory under the tensors that a block is called with, each once."""
    given: list[Any] = [*call.args, *call.kwargs.values()]
    tensors = [value for value in given if isinstance(value, torch.Tensor) and value.is_floating_point()]
    found = {tensor.data_ptr(): tensor.untyped_storage() for tensor in tensors}
    # What cannot be resized was read from the checkpoint: weights that are handed around.
    unique = {storage.data_ptr(): storage for storage in found.values()}.values()
    return [storage for storage in unique if storage.nbytes() >= _SMALLEST and storage.resizable()]


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    # Not by way of numpy: what it has seen can no longer be resized.
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
