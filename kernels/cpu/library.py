"""Library: the C++ kernels, loaded for this CPU, and their calls.

The library that is shipped is taken if it was built from these sources; else one is compiled, once, and kept under
COMPRESS_CACHE. Threads are those of the OpenMP runtime that torch has loaded, as many as torch.get_num_threads() says, so
that no second pool takes their cores.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint.cache import folder_of
from compress.errors import MachineError, Refusal
from compress.kernels.cpu.build import build, compiler, digest, isas, machine, shipped

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As weight.h numbers them; scales may also be bytes, of powers of two and of E4M3."""
SCALES = {**DTYPES, torch.uint8: 3, torch.float8_e4m3fn: 4}
GRIDS = {"table": 0, "int": 1, "e4m3": 2, "e5m2": 3}
LANES, MOST = 16, 1024
"""Sizes of heads that `attend` takes: multiples of the first up to the second."""
_ALONE = 160_000
"""Products of a weight and an activation that a second thread must have, or waiting for it costs more."""
_ALONE_IN_TEAM = 20_000
"""The same where threads spin between products."""
_LOG = logging.getLogger("compress")


class CWeight(ctypes.Structure):
    """`Weight` of weight.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("tiles", "scale", "zero", "minimum", "divisor", "table")),
        *((name, c_void_p) for name in ("outliers", "outlier_columns", "outlier_offsets")),
        *((name, c_int64) for name in ("rows", "columns", "chunks", "groups")),
        *((name, c_int32) for name in ("bits", "grid", "scales", "shift", "middle", "exact", "wide")),
    )


class CWork(ctypes.Structure):
    """`Work` of weight.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "bias", "out", "offsets")),
        *((name, c_int64) for name in ("tokens", "stride", "experts")),
        *((name, c_int32) for name in ("dtype", "threads")),
        ("parallel", c_void_p),
        ("rounded", c_int32),
    )


class CDense(ctypes.Structure):
    """`Dense` of dense.h."""

    _fields_ = (("weight", c_void_p), ("rows", c_int64), ("columns", c_int64), ("work", CWork))


class CRounding(ctypes.Structure):
    """`Rounding` of weight.h."""

    _fields_ = (("sums", c_void_p), *((name, c_int32) for name in ("bits", "asymmetric", "span", "wide")))


class CRows(ctypes.Structure):
    """`Rows` of weight.h."""

    _fields_ = (
        ("weight", ctypes.POINTER(CWeight)), ("index", c_void_p), ("first", c_int64), ("count", c_int64), ("out", c_void_p),
        ("dtype", c_int32), ("threads", c_int32), ("parallel", c_void_p), ("next", c_int64),
    )  # fmt: skip


class CAttention(ctypes.Structure):
    """`Attention` of attention.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "out", "mask")),
        *((name, c_int64) for name in ("batch", "heads", "groups", "keys", "size", "values", "query_batch", "query_head")),
        *((name, c_int64) for name in ("key_batch", "key_group", "key_row", "value_batch", "value_group", "value_row")),
        ("mask_batch", c_int64), ("scale", c_float), ("dtype", c_int32), ("threads", c_int32), ("parallel", c_void_p),
    )  # fmt: skip


class CNorm(ctypes.Structure):
    """`Norm` of steps.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "out")), ("rows", c_int64), ("width", c_int64), ("epsilon", c_float),
        ("plus_one", c_int32), ("dtype", c_int32),
    )  # fmt: skip


class CRotary(ctypes.Structure):
    """`Rotary` of steps.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "cos", "sin")),
        *((name, c_int64) for name in ("batch", "heads", "groups", "size", "angles")),
        ("dtype", c_int32),
    )


class CMix(ctypes.Structure):
    """`Mix` of steps.h."""

    _fields_ = (("x", c_void_p), ("out", c_void_p), ("count", c_int64), ("block", c_int32), ("dtype", c_int32))


class CGate(ctypes.Structure):
    """`Gate` of steps.h."""

    _fields_ = (*((name, c_void_p) for name in ("gate", "up", "out")), ("count", c_int64), ("dtype", c_int32))


class CLinear(ctypes.Structure):
    """`Linear` of block.h."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("exact", c_int64), ("how", c_void_p))


class CScaled(ctypes.Structure):
    """`Scaled` of block.h."""

    _fields_ = (("weight", c_void_p), ("epsilon", c_float), ("plus_one", c_int32))


class CBlock(ctypes.Structure):
    """`Block` of block.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "out", "cos", "sin", "mask", "keys", "values")),
        *((name, c_int64) for name in ("batch", "count", "room", "mask_batch", "angles")),
        *((name, CLinear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, CScaled) for name in ("first_norm", "second_norm", "query_norm", "key_norm")),
        *((name, c_int64) for name in ("heads", "groups", "size")), ("scale", c_float), ("alone", c_int64),
        ("dtype", c_int32), ("threads", c_int32), ("parallel", c_void_p),
    )  # fmt: skip


class Library:
    """The kernels of one instruction set."""

    def __init__(self, path: Path, isa: str = "") -> None:
        """`isa` is one that this CPU has; by default the best. Raises MachineError for a file that is no such library."""
        try:
            held = ctypes.CDLL(str(path))
            held.isa.restype = held.sources.restype = ctypes.c_char_p
            self.path, self.isa, self.sources = path, isa or held.isa().decode(), held.sources().decode()
            self._product: Callable[..., int] = getattr(held, f"product_{self.isa}")
            self._integers: Callable[..., int] = getattr(held, f"integers_{self.isa}")
            self._expand: Any = getattr(held, f"expand_{self.isa}")
            self._integer_rows: Any = getattr(held, f"integer_rows_{self.isa}")
            self._attend: Callable[..., int] = getattr(held, f"attend_{self.isa}")
            self._blocks: Callable[..., int] = getattr(held, f"blocks_{self.isa}")
            self._norm, self._rotary, self._mix, self._gate, self._dense = (
                getattr(held, f"{name}_{self.isa}") for name in ("norm", "rotary", "mix", "gate", "dense")
            )
        except (OSError, AttributeError) as error:
            raise MachineError(str(path), "a library of kernels", str(error), "install compress again") from None
        for function in (self._expand, self._integer_rows, self._norm, self._rotary, self._mix, self._gate, self._dense):
            function.restype = None
        self.parallel = _parallel()

    def product(self, weight: CWeight, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
                offsets: torch.Tensor | None = None, rounded: bool = False) -> None:  # fmt: skip
        """x [tokens, columns], with neighbouring columns, by a matrix; or by those of a stack, tokens of each from offsets on.

        `rounded` tells that values may be rounded to x's dtype first, as `expand` rounds them.
        """
        asked = self._asked(weight.rows * weight.columns, x, bias, out, offsets, rounded)
        if self._product(ctypes.byref(weight), ctypes.byref(asked)):
            raise MemoryError(f"activations of {x.shape[0]} tokens")

    def integers(self, weight: CWeight, rounding: CRounding, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
                 offsets: torch.Tensor | None = None) -> None:  # fmt: skip
        """The same by whole numbers, once activations are rounded to such; codes in the order of integers.cpp."""
        asked = self._asked(weight.rows * weight.columns, x, bias, out, offsets)
        if self._integers(ctypes.byref(weight), ctypes.byref(asked), ctypes.byref(rounding)):
            raise MemoryError(f"activations of {x.shape[0]} tokens")

    def dense(self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., columns] of a few tokens by plain numbers [rows, columns], all neighbours; columns are a multiple of 32."""
        rows, columns = weight.shape
        out = x.new_empty(*x.shape[:-1], rows)
        asked = self._asked(weight.numel(), x.view(-1, columns), bias, out)
        self._dense(ctypes.byref(CDense(weight.data_ptr(), rows, columns, asked)))
        return out

    def _asked(self, numbers: int, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
               offsets: torch.Tensor | None = None, rounded: bool = False) -> CWork:  # fmt: skip
        tokens, experts = x.shape[0], 1 if offsets is None else len(offsets) - 1
        return CWork(
            x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
            None if offsets is None else offsets.data_ptr(), tokens, x.stride(0), experts, DTYPES[x.dtype],
            min(torch.get_num_threads(), 1 + numbers * tokens // _ALONE), self.parallel, rounded,
        )  # fmt: skip

    def expand(self, weight: CWeight, rows: slice | torch.Tensor, out: torch.Tensor, integers: bool = False) -> None:
        """Dequantized rows into out [n, columns]: of a slice that begins at a tile, or of an index int64 [n].

        `integers` tells that codes are in the order of integers.cpp.
        """
        index, first = (None, rows.start) if isinstance(rows, slice) else (rows.contiguous(), 0)
        place = None if index is None else index.data_ptr()
        asked = CRows(
            ctypes.pointer(weight), place, first, len(out), out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads(),
            self.parallel,
        )  # fmt: skip
        (self._integer_rows if integers else self._expand)(ctypes.byref(asked))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
               mask: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """softmax(scale q k) v: [batch, heads, size] by [batch, groups, keys, size] and [batch, groups, keys, values].

        Sizes are multiples of LANES up to MOST, their numbers neighbours in memory; the mask is bool [batch, keys].
        """
        batch, heads, size = query.shape
        _, groups, keys, values = value.shape
        out = query.new_empty(batch, heads, values)
        ask = CAttention(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), None if mask is None else mask.data_ptr(),
            batch, heads, groups, keys, size, values, *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
            0 if mask is None else mask.stride(0), scale, DTYPES[query.dtype],
            min(torch.get_num_threads(), 1 + batch * heads * keys * (size + values) // _ALONE), self.parallel,
        )  # fmt: skip
        if self._attend(ctypes.byref(ask)):
            raise MemoryError(f"attention over {keys} keys")
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, plus_one: bool) -> torch.Tensor:
        """x [..., width] over the root of its mean square plus epsilon, by the weight [width], or by the weight plus one."""
        out, width = torch.empty_like(x), weight.numel()
        job = CNorm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, epsilon, plus_one, DTYPES[x.dtype]
        )
        self._norm(ctypes.byref(job))
        return out

    def rotary(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, size: int) -> None:
        """Rotates query [batch, heads size] and key [batch, groups size] in place, by angles [batch or 1, ..., size]."""
        batch, angles = query.shape[0], 0 if cos.shape[0] == 1 else size
        job = CRotary(
            query.data_ptr(), key.data_ptr(), cos.data_ptr(), sin.data_ptr(), batch, query.shape[1] // size, key.shape[1] // size,
            size, angles, DTYPES[query.dtype],
        )  # fmt: skip
        self._rotary(ctypes.byref(job))

    def mix(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """x [..., width], neighbours in memory: each `block` numbers by the Hadamard matrix of that order over its root."""
        out = torch.empty_like(x)
        self._mix(ctypes.byref(CMix(x.data_ptr(), out.data_ptr(), x.numel(), block, DTYPES[x.dtype])))
        return out

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) up, of any shape."""
        out = torch.empty_like(gate)
        self._gate(ctypes.byref(CGate(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), DTYPES[gate.dtype])))
        return out

    def blocks(self, jobs: Sequence[CBlock]) -> None:
        """Decoder blocks of one token of each text, one after another; `alone`, `threads` and `parallel` are set here."""
        threads = torch.get_num_threads()
        for job in jobs:
            job.alone, job.threads, job.parallel = _ALONE_IN_TEAM, threads, self.parallel
        if self._blocks((CBlock * len(jobs))(*jobs), c_int64(len(jobs))):
            raise MemoryError(f"a block of {jobs[0].batch} tokens")

    def __str__(self) -> str:
        threads = f"{torch.get_num_threads()} threads of torch's OpenMP" if self.parallel else "one thread: torch has no OpenMP"
        return f"{self.isa}, {threads}, {self.path.name}"


@lru_cache(maxsize=1)
def library() -> Library:
    """The library for this CPU. Raises Refusal if there is none and none can be compiled."""
    try:
        return _shipped() or _compiled()
    except MachineError as error:
        problem = error.problems[0]
        raise Refusal(f"there are no CPU kernels: {problem.where}: {problem.got}", problem.do) from None


def _shipped() -> Library | None:
    if sys.platform != "linux" or not shipped(machine()).is_file():
        return None
    found = Library(shipped(machine()))
    if found.sources == digest():
        return found
    _LOG.info("%s was built from other sources", found.path)
    return None


def _compiled() -> Library:
    place = folder_of("kernels") / f"cpu-{machine()}-{digest()[:16]}.so"
    if not place.is_file():
        command = compiler()
        if command is None:
            raise MachineError(
                "CXX", "a C++ compiler", f"none, and no library for {machine()} is shipped", "install g++ or clang"
            )
        _LOG.info("%s compiles the CPU kernels for %s", command, ", ".join(isas(machine())))
        try:
            build(place, command, machine())
        except OSError as error:
            raise MachineError(str(place), "a file to keep", str(error), "set COMPRESS_CACHE to a folder to write to") from None
    return Library(place)


def _parallel() -> int | None:
    """The address of GOMP_parallel where torch brings or loads an OpenMP runtime that has it."""
    everything: Any = ctypes.CDLL(None)
    try:
        return ctypes.cast(everything.GOMP_parallel, c_void_p).value
    except AttributeError:
        return None
