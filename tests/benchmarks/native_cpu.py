"""Benchmark: packed weights against a dense bf16 product on the CPU, at the shapes of decoding.

    python tests/benchmarks/native_cpu.py [--schemes w4a16g128,w3a16g128,nf4g64] [--shapes 4096x4096,14336x4096] [--tokens 1,4,16,64]

Each row is checked against the reference backend before it is timed. Every shape has as many different weights as no cache
holds, which take turns, as the layers of a model do; times are the best and the median of rounds in which all backends and
the dense product are timed after one another. Bytes are those of the weight as it lies in memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear

from compress.algebra.rounding import nearest
from compress.cli.console import table
from compress.errors import Refusal
from compress.facts import State
from compress.kernels.dispatch import BACKENDS, Work, load_backend
from compress.kernels.native.packed import Packed, pack
from compress.scheme import Scheme

ROUNDS, WEIGHT_BYTES = 7, 160 << 20
_CALLS = 3
"""Of a round, each with another weight."""
ALLOWED = 2e-2
"""Largest difference from the reference, of the largest output: both are in bf16."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", default="w4a16g128,w4a16g128-asym,w3a16g128,nf4g64")
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    isa = torch.backends.cpu.get_cpu_capability()
    print(f"device: {platform.processor() or platform.machine()}, {isa}, {args.threads} threads, torch {torch.__version__}")
    rows = []
    for shape in args.shapes.split(","):
        out, inputs = map(int, shape.split("x"))
        dense = torch.randn(out, inputs).bfloat16()
        copies = max(1, WEIGHT_BYTES // dense.nbytes)
        weights = [dense + i for i in range(copies)]
        for text in args.schemes.split(","):
            for tokens in map(int, args.tokens.split(",")):
                x = torch.randn(tokens, inputs).bfloat16()
                rows += measured(shape, Scheme.parse(text), x, dense, weights)
    table(("shape", "scheme", "tokens", "what", "best ms", "median ms", "GB/s", "of dense bf16"), rows)


def measured(
    shape: str, scheme: Scheme, x: torch.Tensor, dense: torch.Tensor, weights: list[torch.Tensor]
) -> list[tuple[str, ...]]:  # fmt: skip
    """A row for the dense product, and one for every backend that takes the scheme."""
    state, packed = State(scheme), pack(nearest(dense, scheme, torch.bfloat16).q)
    plain = Packed(state, *dense.shape, packed)
    expected = load_backend("reference").linear(x, plain, None, False).float()
    runs: dict[str, tuple[int, list[Callable[[], torch.Tensor]]]] = {
        "dense bf16": (dense.nbytes, [partial(linear, x, weight) for weight in weights])
    }
    for name in BACKENDS:
        backend = load_backend(name)
        try:
            backend.refuse(Work(state, *dense.shape, x.dtype, packed["scale"].dtype, "cpu"))
        except Refusal:
            continue
        parts = backend.prepare(plain)
        difference = (backend.linear(x, Packed(state, *dense.shape, parts), None, False).float() - expected).abs().max()
        if difference > ALLOWED * expected.abs().max():
            raise SystemExit(f"{name} on {scheme}: off by {float(difference):.3g}; nothing is timed")
        size = sum(part.nbytes for part in parts.values())
        copies = [
            Packed(state, *dense.shape, {key: part.clone() for key, part in parts.items()})
            for _ in range(max(1, WEIGHT_BYTES // size))
        ]
        runs[name] = (size, [partial(backend.linear, x, copy, None, False) for copy in copies])
    seconds = timed({name: calls for name, (_, calls) in runs.items()})
    base = min(seconds["dense bf16"])
    found = []
    for name, (size, _) in runs.items():
        best, median = min(seconds[name]), statistics.median(seconds[name])
        cells = (f"{best * 1e3:.3f}", f"{median * 1e3:.3f}", f"{size / best / 1e9:.2f}", f"{base / best:.2f}x")
        found.append((shape, str(scheme), str(len(x)), name, *cells))
    return found


def timed(runs: dict[str, list[Callable[[], torch.Tensor]]]) -> dict[str, list[float]]:
    """Seconds of a call, a number for each round; all take part in every round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS):
        for name, calls in runs.items():
            some = [calls[(round_ * _CALLS + i) % len(calls)] for i in range(_CALLS)]
            started = time.perf_counter()
            for call in some:
                call()
            found[name].append((time.perf_counter() - started) / len(some))
    return found


if __name__ == "__main__":
    main()
