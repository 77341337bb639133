"""Bench: times products by packed weights, next to dense and third-party ones.

A case is a weight and a number of tokens; every round runs all products of the weight in turn. Before anything is timed, each
product is checked against an fp32 product by the dequantized weight, and a wrong one is not timed. A product cycles through
several equal weights, more than any cache holds, like the layers of a model, on a CPU in large pages as a model has them. On a
GPU a round replays a CUDA graph. Bytes are those of the weight in memory; bandwidth is these bytes divided by the time.

A weight is made of some rows of random numbers, which are rounded and then repeated.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from compress.errors import CompressError, UsageError
from compress.kernels.cpu.large_pages import LargePages, size_of
from compress.kernels.dispatch import BACKENDS, Backend, Work, ask
from compress.kernels.native.layout import Native
from compress.kernels.native.narrow import whole
from compress.kernels.native.packed import Packed
from compress.kernels.third_party_backends import Call, Other, others
from compress.numerics import lowrank, masks
from compress.numerics.inputs import rounded_inputs
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight

LAYERS = {
    (4096, 4096): "7B qkv/o", (22016, 4096): "7B gate+up", (4096, 11008): "7B down", (10240, 8192): "70B qkv",
    (8192, 8192): "70B o", (57344, 8192): "70B gate+up", (8192, 28672): "70B down",
}  # fmt: skip
"""(rows, columns) of the linears of Llama models -> name."""
HEAD = (
    "layer", "state", "tokens", "product", "min us", "median us", "GB/s", "of peak", "by dense", "by best other", "off by", "how",
)  # fmt: skip
ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}
"""Largest difference from fp32, as a share of the largest output."""
ROUNDED = 2e-2
"""The same of a product that rounds activations to 8 bits."""
WEIGHT_BYTES = 160 << 20
"""Bytes of the equal weights together; more than any cache holds."""
DENSE = "dense"
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_BAND = 512
_ROUNDS = 9
_ROUND_SECONDS = 0.02
_FEW_SECONDS = 0.5
"""Seconds; a slower product is timed in fewer rounds."""
_PEAKS = {
    "B200": 8.0e12, "H200": 4.8e12, "H100 PCIe": 2.04e12, "H100 NVL": 3.94e12, "H100": 3.35e12, "A100-SXM4-40GB": 1.56e12,
    "A100-PCIE-40GB": 1.56e12, "A100 80GB PCIe": 1.94e12, "A100-SXM4-80GB": 2.04e12, "L40S": 0.864e12, "L40": 0.864e12,
    "L4": 0.3e12, "A10": 0.6e12, "V100": 0.9e12, "T4": 0.32e12,
}  # fmt: skip
"""Nominal bandwidth by part of a GPU's name, longer parts first."""


@dataclass(frozen=True)
class Row:
    """One product of one case. `fault` says why it was not timed; then there are no seconds."""

    rows: int
    columns: int
    state: str
    tokens: int
    what: str
    ours: bool
    weight_bytes: int
    difference: float = math.nan
    """Largest difference from fp32, as a share of the largest output."""
    seconds: tuple[float, ...] = ()
    """Seconds of one product, a number for each round."""
    how: str = ""
    """graph: replayed as a CUDA graph; eager: called from Python."""
    fault: str = ""

    @property
    def case(self) -> str:
        """A text that is the same for all products of a case."""
        return f"{self.rows}x{self.columns} {self.state}, {self.tokens} tokens"

    @property
    def best(self) -> float:
        return min(self.seconds, default=math.nan)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def bandwidth(self) -> float:
        """Bytes of the weight per second in the best round."""
        return self.weight_bytes / self.best


@dataclass(frozen=True)
class Product:
    """A kind of product of x [tokens, columns] and a weight: several callables, each with its own copy of the weight."""

    what: str
    weight_bytes: int
    calls: Sequence[Call]
    exact: Call
    """The exact product, in fp32."""
    ours: bool
    rounds: bool = False
    """Whether it rounds activations to 8 bits that the scheme leaves alone."""


def parse_state(text: str) -> State:
    """Parses a scheme, or a state such as codes(w4a16g64)+masked(2:4). Raises UsageError for a state that cannot be timed."""
    try:
        state = State.parse(text if "(" in text else f"codes({text})")
    except ValueError as error:
        raise UsageError("schemes", "schemes such as w4a16g128, or codes(w4a16g64)+masked(2:4)", str(error)) from None
    if state == State() or state.needs():
        raise UsageError("schemes", "codes with nothing beside them, or masked(2:4)", f"'{text}'")
    return state


def table(
    shapes: Iterable[tuple[int, int]], states: Sequence[State], tokens: Sequence[int], device: str, dtype: torch.dtype,
    backend: str | None = None, until: float = math.inf, skipped: Callable[[str], None] = lambda case: None,
) -> Iterator[Row]:  # fmt: skip
    """Yields the rows of every case; `skipped` is called for cases that would begin after `until`.

    `backend` limits our backends to one. `until` is in seconds of time.monotonic.
    """
    for rows, columns in shapes:
        for state in states:
            if time.monotonic() >= until:
                skipped(f"{rows}x{columns} {state}, every number of tokens")
                continue
            products = made(rows, columns, state, device, dtype, backend)
            for count in tokens:
                if time.monotonic() >= until:
                    skipped(f"{rows}x{columns} {state}, {count} tokens")
                    continue
                generator = torch.Generator().manual_seed(count)
                x = torch.randn(count, columns, generator=generator).to(device, dtype)
                if state.scheme is not None and state.scheme.inputs:
                    x = rounded_inputs(x, state.scheme)
                yield from measured(Case(rows, columns, state), products, x)
            del products
            if device == "cuda":
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class Case:
    """A weight of the table."""

    rows: int
    columns: int
    state: State

    def row(self, product: Product, tokens: int) -> Row:
        return Row(self.rows, self.columns, str(self.state), tokens, product.what, product.ours, product.weight_bytes)


def made(rows: int, columns: int, state: State, device: str, dtype: torch.dtype, backend: str | None = None) -> list[Product]:
    """The dense product, one for every backend that supports the weight, and third-party ones."""
    scheme = state.scheme
    band = _BAND if rows % _BAND == 0 else rows
    few = random_weight(state, band, columns, dtype)
    few = replace(few, parts={name: part.to(device) for name, part in few.parts.items()})
    meant, times = few.values().float(), rows // band

    def exact(x: torch.Tensor) -> torch.Tensor:
        return linear(x.float(), meant).repeat(1, times)

    def repeated(name: str, part: torch.Tensor) -> torch.Tensor:
        one = part.dim() == 0 or (name == "scale" and scheme is not None and scheme.scales == "tensor")
        return part if one else part.repeat(times, *[1] * (part.dim() - 1))

    packed = replace(few, rows=rows, parts={name: repeated(name, part) for name, part in few.parts.items()})
    dense = meant.to(dtype).repeat(times, 1)
    found = [
        _product(DENSE, dense.nbytes, lambda n: [partial(_dense, own["w"]) for own in _copies({"w": dense}, n)], exact, False)
    ]
    for name in BACKENDS if backend is None else (backend,):
        work = Work(state, rows, columns, dtype, packed.parts.get("scale", packed.parts["tiles"]).dtype, device)
        taken, refused = ask(work, name)
        if taken is None:
            if backend is not None:
                raise UsageError(f"backend {name}", f"one that runs {state}", refused[name].reason, refused[name].do)
            continue
        held = replace(packed, parts=taken.prepare(packed))
        size = sum(part.nbytes for part in held.parts.values())
        # Some round their inputs by themselves, and what has been rounded once more.
        own, rounds = exact, taken.rounds_inputs
        if rounds and scheme is not None and scheme.inputs:
            own, rounds = partial(_of_rounded, exact, scheme), False
        found.append(_product(name, size, partial(_runs, taken, held), own, True, rounds))
    if backend is None:
        found += [_other(what, make, exact) for what, make in others(packed, dtype)]
    return found


def random_weight(state: State, rows: int, columns: int, dtype: torch.dtype, experts: int | None = None) -> Packed:
    """Random numbers rounded to a state, as parts of an artifact; reproducible."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, columns) if experts is None else (experts, rows, columns)
    w = torch.randn(shape, generator=generator).to(dtype)
    if state.sparsity is not None:
        w *= masks.keep_best(w.float().abs(), state.sparsity)
    value: Any = w
    if state.scheme is not None:
        value = nearest(w, state.scheme, dtype, outliers=state.outliers).q
        if state.lowrank is not None:
            factors = lowrank.best(w.float() - value.dequantize(), state.lowrank.rank)
            value = replace(value, lowrank=lowrank.stored(*factors, state.lowrank))
    weight = Weight("w", _STORED[dtype], shape, "linear" if experts is None else "expert")
    tensors = Native().encode_as(weight, state, value)
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    # On disk the last chunk of columns may be cut off.
    return Packed(state, rows, columns, parts if state.scheme is None else whole(parts, state.scheme, columns))


def _product(
    what: str, weight_bytes: int, copies: Callable[[int], list[Call]], exact: Call, ours: bool, rounds: bool = False
) -> Product:
    return Product(what, weight_bytes, copies(-(-WEIGHT_BYTES // weight_bytes)), exact, ours, rounds)


def _other(what: str, make: Callable[[], Other], exact: Call) -> Product:
    """A third-party product; if it cannot be made, one that raises the error, which its row then reports."""
    try:
        other = make()
        return _product(what, other.weight_bytes, lambda n: [other.copy() for _ in range(n)], other.exact or exact, False)
    except Exception as error:
        return Product(what, 0, [partial(_raise, error)], exact, False)


def _of_rounded(exact: Call, scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    return exact(rounded_inputs(x, scheme))


def _raise(error: Exception, x: torch.Tensor) -> torch.Tensor:
    raise error


def _dense(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear(x, w)


def _runs(backend: Backend, packed: Packed, count: int) -> list[Call]:
    def run(x: torch.Tensor, own: Packed) -> torch.Tensor:
        return backend.linear(x, own, None, False)

    return [partial(run, own=replace(packed, parts=parts)) for parts in _copies(packed.parts, count)]


def _copies(parts: Mapping[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """Copies of all parts; on a CPU where the weights of a model that is loaded lie."""
    on_cpu = all(part.device.type == "cpu" for part in parts.values())
    pages = LargePages.of(count * sum(map(size_of, parts.values()))) if on_cpu else None
    copied = torch.clone if pages is None else pages.copied
    return [{name: copied(part) if part.numel() else part.clone() for name, part in parts.items()} for _ in range(count)]


def measured(case: Case, products: Sequence[Product], x: torch.Tensor) -> list[Row]:
    """A row for each product of a case, x [tokens, columns]; all correct ones are timed in the same rounds."""
    found, rounds = [], {}
    for product in products:
        row = _checked(case.row(product, len(x)), product, x)
        if not row.fault:
            round_, how = _round(product.calls, x)
            row, rounds[product.what] = replace(row, how=how), round_
        found.append(row)
    spent: dict[str, list[float]] = {what: [] for what in rounds}
    for number in range(_ROUNDS):
        for what, round_ in rounds.items():
            if number < 3 or spent[what][-1] < _FEW_SECONDS:
                spent[what].append(round_())
    return [replace(row, seconds=tuple(spent.get(row.what, ()))) for row in found]


def _checked(row: Row, product: Product, x: torch.Tensor) -> Row:
    """The row with its difference from fp32, and its fault if there is one."""
    try:
        out = product.calls[0](x)
    except Exception as error:  # third-party kernels may raise anything; the row reports it
        return replace(row, fault=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    exact = product.exact(x)
    difference = float((out.float() - exact).abs().max() / exact.abs().max())
    allowed = max(ALLOWED[x.dtype], ROUNDED if product.rounds else 0)
    # Written so that a NaN is a fault.
    fault = "" if difference <= allowed else f"off by {difference:.2g} of the largest output, where {allowed:g} is allowed"
    return replace(row, difference=difference, fault=fault)


def _round(calls: Sequence[Call], x: torch.Tensor) -> tuple[Callable[[], float], str]:
    """(a function that times a round and returns the seconds of one product, graph or eager)."""
    if x.is_cuda:
        return _cuda_round(calls, x)
    started = time.perf_counter()
    calls[-1](x)
    each = max(1, min(len(calls), int(_ROUND_SECONDS / (time.perf_counter() - started))))
    next_ = iter(range(1 << 62))

    def round_() -> float:
        some = [calls[next(next_) % len(calls)] for _ in range(each)]
        started = time.perf_counter()
        for call in some:
            call(x)
        return (time.perf_counter() - started) / each

    return round_, "eager"


def _cuda_round(calls: Sequence[Call], x: torch.Tensor) -> tuple[Callable[[], float], str]:
    some = [calls[i % len(calls)] for i in range(max(4, len(calls)))]

    def all_of_them() -> None:
        for call in some:
            call(x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_of_them()
    torch.cuda.current_stream().wait_stream(stream)
    graph, how = torch.cuda.CUDAGraph(), "graph"
    try:
        with torch.cuda.graph(graph):
            all_of_them()
        run = graph.replay
        run()
    except (RuntimeError, CompressError):
        # A product that reads a number back from the GPU cannot be captured.
        run, how = all_of_them, "eager"
    torch.cuda.synchronize()

    def round_() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / len(some)

    return round_, how


def peak_bandwidth(device: str) -> tuple[float, str]:
    """(peak bytes per second of the memory, the source of that number)."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for part, bandwidth in _PEAKS.items():
            # A MIG slice of a GPU has a share of its bandwidth.
            if re.search(rf"\b{part}\b", name) and "MIG" not in name:
                return bandwidth, f"nominal, of {name}"
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    round_, _ = _round([lambda x: target.copy_(x)], source)
    return 2 * source.nbytes / min(round_() for _ in range(12)), "measured by a copy of 256 MiB, read and written"


def facts(row: Row) -> dict[str, Any]:
    """A row as JSON; null where there is no number."""
    timed = {"best_seconds": row.best, "median_seconds": row.median, "bytes_per_second": row.bandwidth} if row.seconds else {}
    return {**vars(row), "difference": row.difference if math.isfinite(row.difference) else None, **timed}


def cells(rows: Sequence[Row], bandwidth: float) -> list[tuple[str, ...]]:
    """Rows as cells of a table; ratios of best times are above 1 if a row is faster than dense, or than the best of others."""
    dense = {row.case: row.best for row in rows if row.what == DENSE}
    others: dict[str, float] = {}
    for row in rows:
        if not row.ours and row.what != DENSE and row.seconds:
            others[row.case] = min(row.best, others.get(row.case, row.best))
    found = []
    for row in rows:
        layer = f"{LAYERS.get((row.rows, row.columns), '')} {row.rows}x{row.columns}".strip()
        timed = [
            f"{row.best * 1e6:.1f}",
            f"{row.median * 1e6:.1f}",
            f"{row.bandwidth / 1e9:.1f}",
            f"{row.bandwidth / bandwidth:.0%}",
        ]
        ratios = [f"{base[row.case] / row.best:.2f}x" if row.case in base else "-" for base in (dense, others)]
        numbers = [*timed, *ratios, f"{row.difference:.1g}", row.how] if row.seconds else [*["-"] * 7, row.fault]
        found.append((layer, row.state, str(row.tokens), row.what, *numbers))
    return found
