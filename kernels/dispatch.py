"""Dispatch: loads formats by name, and chooses the backend of a packed weight."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compress.errors import InputError, Refusal, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

    from compress.contract.format import Format
    from compress.kernels.native.packed import Packed
    from compress.spec.weight_state import State

BACKENDS = (
    "scaled_mm", "semi_structured", "gpu", "cuda", "triton", "cublas", "integers", "simd", "int4pack", "int8pack", "cpu",
    "reference",
)  # fmt: skip
"""Backends of the native format, the fastest first; each is the one subclass of Backend in its file."""
_LOG = logging.getLogger("compress")


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Names of the formats, such as `compressed-tensors` for the folder `compressed_tensors`; imports nothing."""
    folder = Path(__file__).parent
    return tuple(sorted(path.parent.name.replace("_", "-") for path in folder.glob("*/layout.py")))


@lru_cache
def load_format(name: str) -> type[Format]:
    """The Format class of that name. Raises InputError for an unknown name, such as one in a manifest."""
    from compress.contract.format import Format

    if name not in formats():
        raise InputError("format", f"one of {', '.join(formats())}", f"'{name}'", "take the version of compress that made it")
    module = importlib.import_module(f"compress.kernels.{name.replace('-', '_')}.layout")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Format)]
    return next(cls for cls in found if cls.name == name)


@dataclass(frozen=True)
class Work:
    """The task of a backend: a packed weight, and how it is used."""

    state: State
    rows: int
    columns: int
    dtype: torch.dtype
    """Dtype of activations."""
    scales: torch.dtype
    """Dtype of stored scales."""
    device: str
    """Where the weight lies: cpu or cuda."""
    turned: bool = False
    """Whether inputs are in rows, y = x @ w + b, as in a Conv1D; else y = x @ w.T + b."""
    looked_up: bool = False
    """Whether its rows are looked up, as in an embedding."""
    multiplied: bool = True
    """Whether anything is multiplied by it; for an embedding only if a head is tied to it."""
    experts: int | None = None
    """The number of matrices in a stack; None for a single matrix."""
    asked: bool = False
    """Whether the user named the backend: then it may trade memory for speed."""


class Backend:
    """Multiplies activations by a packed weight. It keeps no dense copy; its parts are as large as the packed weight."""

    name: ClassVar[str] = ""
    multiple: ClassVar[int] = 16
    """Chunks of rows begin at multiples of this."""
    rounds_inputs: ClassVar[bool] = False
    """Whether it gets inputs as they are, and rounds them itself where the scheme does."""
    keeps_columns: ClassVar[bool] = False
    """Whether it runs weights with kept columns beside their codes."""

    def refuse(self, work: Work) -> None:
        """Raises Refusal if it cannot run this work."""

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        """The tensors that it keeps instead of the stored parts of a matrix."""
        return dict(packed.parts)

    def chunks(self, packed: Packed, weights: int = 1 << 20) -> Iterator[slice]:
        """Slices of all rows, with about `weights` weights each."""
        step = self.multiple * max(1, weights // (self.multiple * packed.columns))
        for start in range(0, packed.rows, step):
            yield slice(start, min(packed.rows, start + step))

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some dequantized rows [n, columns], for a slice from `chunks`."""
        return packed.values(rows).to(dtype)

    def lookup(self, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        """Rows [n, columns], in fp32, for ids int64 [n]."""
        return packed.values(ids)

    def linear(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
        """x [tokens, inputs] -> [tokens, outputs], in x's dtype; `packed` has the parts of `prepare`."""
        raise TypeError(f"{self.name} does not multiply")

    def grouped(self, x: torch.Tensor, packed: Packed, offsets: torch.Tensor) -> torch.Tensor:
        """x [rows, inputs] by the matrices of a stack -> [rows, outputs].

        Rows are sorted by expert: those of expert e begin at offsets[e], int32 [experts + 1], and end at offsets[e + 1].
        """
        out, ends = x.new_empty(len(x), packed.rows), offsets.tolist()
        for expert, (start, end) in enumerate(pairwise(ends)):
            if start < end:
                out[start:end] = self.linear(x[start:end], packed.expert(expert), None, False)
        return out


def load_backend(name: str) -> Backend:
    """A backend by its name. Raises UsageError for an unknown name."""
    if name not in BACKENDS:
        raise UsageError("backend", f"one of {', '.join(BACKENDS)}", f"'{name}'{did_you_mean(name, BACKENDS)}")
    return _load(name)


@cache
def _load(name: str) -> Backend:
    module = importlib.import_module(f"compress.kernels.native.{name}")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Backend)]
    return next(cls for cls in found if cls.name == name)()


def refuse(backend: Backend, work: Work) -> None:
    """Raises Refusal if a backend cannot run this work."""
    if work.state.columns is not None and not backend.keeps_columns:
        raise Refusal("it has kept columns beside its codes", "use another backend")
    backend.refuse(work)


def ask(work: Work, name: str | None = None) -> tuple[Backend | None, dict[str, Refusal]]:
    """(the backend of that name, or the first that accepts the work, if any; the refusals of those asked before it)."""
    refused = {}
    for candidate in BACKENDS if name is None else (name,):
        backend = load_backend(candidate)
        try:
            refuse(backend, replace(work, asked=name is not None))
        except Refusal as refusal:
            refused[candidate] = refusal
            continue
        return backend, refused
    return None, refused


def choose(work: Work, name: str | None = None) -> Backend:
    """The backend of that name, or the first that accepts the work.

    Raises UsageError if the named one refuses, or if none accepts. Refusals of others are logged, once for each reason.
    """
    backend, refused = ask(work, name)
    if name is not None and backend is None:
        raise UsageError(f"backend {name}", f"one that runs {work.state}", refused[name].reason, refused[name].do)
    for candidate, refusal in refused.items():
        tell_once(candidate, refusal.reason)
    if backend is None:
        raise UsageError("backend", f"one that runs {work.state} on {work.device}", f"none of {', '.join(BACKENDS)}")
    return backend


@cache
def tell_once(backend: str, reason: str) -> None:
    _LOG.info("backend %s is passed over: %s", backend, reason)
