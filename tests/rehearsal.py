"""Rehearsal: plain CPU tensors, some of which count as lying on a GPU that is not there.

Which ones is known by their memory: what is made with `device="cuda"`, sent there by `to`, or computed from such tensors. They say
so when they are asked for their `device`; everything is computed by the CPU's kernels, so numbers are the same bits. As on
a GPU, an operation on tensors from here and there is an error, and so is reading one's memory. What is read back by the host is
noted with the function of ours that did it: each of these makes a GPU wait.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import compress
from compress import device

NAME, FREE_BYTES = "Rehearsed", 8 << 30
GPU = torch.device("cuda", 0)
_ROOT = Path(compress.__file__).parents[1]
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_PUTS = {_aten.index_put, _aten.index_put_}
_READS = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive,
    _aten.bincount, _aten.equal, _aten.is_nonzero,
}  # fmt: skip
"""Operations whose result, or its size, the host waits for."""


class Rehearsal(TorchFunctionMode):
    """While it is entered there is a GPU; `reads` counts what the host read back, by the function that did."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.gpu = torch.device("cuda", number)
        self._there: dict[int, StorageWeakRef] = {}
        self._inside = False
        self._checks = _Checks(self)
        self.reads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.peak_bytes = 0

    def __enter__(self) -> Rehearsal:
        self._undo = ExitStack()
        # As fast in bfloat16 as the CPU is, so that both choose the same dtype.
        bf16 = device.has_bf16(device.CPU)
        for name, answer in {
            "set_device": None, "get_device_name": NAME, "mem_get_info": (FREE_BYTES, FREE_BYTES), "is_bf16_supported": bf16,
            "max_memory_allocated": 1 << 20,
        }.items():  # fmt: skip
            self._undo.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        self._undo.enter_context(patch.object(device, "gpus", lambda: self.gpu.index + 1))
        # Who handles a function is out of the way meanwhile, and functions of ours run in a backward pass.
        self._undo.enter_context(patch.object(torch.autograd, "has_torch_function", lambda *_: False))
        self._checks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._checks.__exit__(*error)
        self._undo.close()

    def is_there(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in self._there

    def put(self, tensor: torch.Tensor, there: bool = True) -> None:
        storage = tensor.untyped_storage()
        if there and tensor.device.type == "cpu":
            self._there[storage._cdata] = StorageWeakRef(storage)
        else:
            self._there.pop(storage._cdata, None)

    def held_bytes(self) -> int:
        """What lies there now."""
        self._there = {key: ref for key, ref in self._there.items() if not ref.expired()}
        return sum(torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in self._there.values())

    def note(self, counts: Counter[str], what: str) -> None:
        counts[f"{_where()}: {what}"] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = any(map(self.is_there, _tensors(args, kwargs)))
        # Getters are made anew each time they are looked up: equal, not the same.
        if func == torch.Tensor.device.__get__ and mine:
            return self.gpu
        if func == torch.Tensor.is_cuda.__get__ and mine:
            return True
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self._to(func, *args, **kwargs)
        if mine and func in (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if mine and func is torch.Tensor.tolist:
            self.note(self.reads, "tolist")
        place = kwargs.get("device")
        if place is not None and func is not torch.asarray:
            place = torch.device(place)
            if place.type == "cuda":
                assert place in (self.gpu, torch.device("cuda")), place
                kwargs = {**kwargs, "device": torch.device("cpu")}
            found = func(*args, **kwargs)
            for tensor in _tensors((found,)):
                if tensor.device.type == "cpu":
                    self.put(tensor, place.type == "cuda")
            return found
        before, self._inside = self._inside, mine
        try:
            return func(*args, **kwargs)
        finally:
            self._inside = before

    def _to(self, func: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`to`, `cuda` and `cpu`, which copy where the place is another one."""
        place: Any = {torch.Tensor.cuda: self.gpu, torch.Tensor.cpu: torch.device("cpu")}.get(func, kwargs.pop("device", None))
        rest = list(args)
        for at, value in enumerate(rest):
            if isinstance(value, str | torch.device):
                place = torch.device(rest.pop(at))
                break
            if isinstance(value, torch.Tensor):
                rest[at], place = value.dtype, self.gpu if self.is_there(value) else value.device
                break
        place = None if place is None else torch.device(place)
        here = self.is_there(tensor)
        found = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if place is None or place.type == "meta" or tensor.device.type == "meta":
            return found if place is None else torch.Tensor.to(found, place)
        if (place.type == "cuda") != here:
            if here:
                self.note(self.reads, "cpu")
            else:
                self.note(self.sent, "cuda")
            found = found.clone() if found is tensor or found.untyped_storage()._cdata in self._there else found
            self.put(found, not here)
        return found


class _Checks(TorchDispatchMode):
    """Sees every operation, those of a backward pass too."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self.own = rehearsal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Tensors tell here where they really are, in a backward pass too.
        with torch._C.DisableTorchFunction():
            return self._checked(func, args, kwargs or {})

    def _checked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        own = self.own
        tensors = _tensors(args, kwargs)
        there = [x for x in tensors if own.is_there(x)]
        here = [x for x in tensors if x.device.type == "cpu" and x.dim() and not own.is_there(x)]
        if there and here and func.overloadpacket in (_aten.index, *_PUTS) and not any(x is args[0] for x in here):
            # Torch sends what is looked up by, as it does with a list of numbers.
            own.note(own.sent, "index")
        elif there and here and func not in _COPIES:
            shapes = [f"{list(x.shape)} {'there' if own.is_there(x) else 'here'}" for x in tensors]
            raise RuntimeError(f"tensors on two devices: {func} of {', '.join(shapes)}, in {_where()}")
        elif there and here:
            own.note(own.reads if own.is_there(args[1]) else own.sent, "copy_")
        # With one number for all of them, a mask is filled where it lies.
        by_mask = (func.overloadpacket is _aten.index or (func.overloadpacket in _PUTS and args[2].numel() > 1)) and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if there and (func.overloadpacket in _READS or by_mask):
            own.note(own.reads, func.overloadpacket.__name__)
        found = func(*args, **kwargs)
        if (there and func is not _aten.copy_.default) or (own._inside and not tensors):
            for tensor in _tensors((found,)):
                if tensor.device.type == "cpu":
                    own.put(tensor)
        if len(own._there) > 4096:
            own._there = {key: ref for key, ref in own._there.items() if not ref.expired()}
        return found


def _tensors(values: Iterable[Any], named: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """Those among arguments, in lists and tuples too."""
    found: list[torch.Tensor] = []
    for value in (*values, *named.values()) if named else values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _where() -> str:
    """The innermost function of ours, or of transformers, that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        ours = _ROOT in file.parents and ".venv" not in file.parts and file.name != "rehearsal.py"
        if (ours or "transformers" in file.parts) and not name.startswith("<"):
            return f"{file.stem}.{name}"
        frame = frame.f_back
    return "?"
