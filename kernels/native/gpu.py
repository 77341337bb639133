"""gpu backend: for each number of tokens runs the backend that table.py prefers."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch

from compress.errors import Refusal
from compress.kernels.cuda import device
from compress.kernels.cuda.cubins import Capability
from compress.kernels.dispatch import Work, load_backend, tell_once
from compress.kernels.native import table
from compress.kernels.native.fused import Fused, work_of
from compress.kernels.native.kind import HALVES, Kind
from compress.kernels.native.packed import Packed

_MEMBERS = ("cuda", "triton", "cublas")


class Gpu(Fused):
    """Delegates each product to one of its members."""

    name = "gpu"

    def refuse(self, work: Work) -> None:
        able, refused = _ask(work)
        if not able:
            reasons = dict.fromkeys(refusal.reason for refusal in refused.values())
            raise Refusal("; ".join(reasons), next(iter(refused.values())).do)
        for name, refusal in refused.items():
            tell_once(name, refusal.reason)

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        # Enough for every member.
        return load_backend("cuda").prepare(packed)

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in HALVES:
            return super().rows(packed, rows, dtype)
        return _able(work_of(packed, dtype))[0].rows(packed, rows, dtype)

    def product(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        return _by_speed(work_of(packed, x.dtype), device.capability(device.number(x)), len(x))[0].product(x, packed, bias)

    def add_outliers(self, out: torch.Tensor, x: torch.Tensor, packed: Packed) -> None:
        _able(work_of(packed, x.dtype))[0].add_outliers(out, x, packed)

    def grouped(self, x: torch.Tensor, packed: Packed, offsets: torch.Tensor) -> torch.Tensor:
        tokens = -(-len(x) // (len(offsets) - 1))
        able = _by_speed(work_of(packed, x.dtype), device.capability(device.number(x)), tokens)
        # Not cublas, which reads each expert's number of rows back from the GPU.
        captured = able if torch.cuda.is_current_stream_capturing() else ()
        return next((member for member in captured if member.name != "cublas"), able[0]).grouped(x, packed, offsets)


def _ask(work: Work) -> tuple[tuple[Fused, ...], dict[str, Refusal]]:
    """(the members that accept the work, the refusals of the others)."""
    able, refused = [], {}
    for name in _MEMBERS:
        backend = load_backend(name)
        try:
            backend.refuse(work)
            able.append(cast("Fused", backend))
        except Refusal as refusal:
            refused[name] = refusal
    return tuple(able), refused


@lru_cache(maxsize=256)
def _able(work: Work) -> tuple[Fused, ...]:
    return _ask(work)[0]


@lru_cache(maxsize=4096)
def _by_speed(work: Work, capability: Capability, tokens: int) -> tuple[Fused, ...]:
    """The members that accept the work, those first that are fastest for this many tokens per matrix."""
    order = table.order(capability, Kind.of(work), tokens)
    return tuple(sorted(_able(work), key=lambda member: order.index(member.name)))
