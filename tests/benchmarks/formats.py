"""Benchmark: what every format holds of trained models, and what the readers' own code computes from it.

    python tests/benchmarks/formats.py MODEL [MODEL ...] [--readers transformers,auto-gptq,ours] [--gptqmodel]

For every model, 2, 3, 4 and 8 bits in groups of 32, symmetric or not, and every format: quantize by rounding to nearest and
pack; verify the bytes; read the artifact with each reader of which the plan says yes, and compare logits with what the
artifact means (`ours`: with what the canonical step means); unpack, and compare codes, scales and zero points with the
canonical step's; pack again, and compare every byte. Exit status 1 where anything does not hold that should.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging

from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.cli.console import table
from compress.cli.verify import tokens
from compress.context import Context
from compress.contract.format import Verdict
from compress.errors import CompressError, CoverageError, FormatError
from compress.evaluate import readers
from compress.evaluate.verify import read_with, verify_bytes
from compress.kernels.dispatch import formats
from compress.layerwise.dense_view import DenseView
from compress.pipeline import output_paths
from compress.pipeline.run import Result, run_recipe
from compress.spec.recipe import parse_one_liner

BITS, GROUP = (2, 3, 4, 8), 32


@dataclass
class Matrix:
    """The table as it grows: its rows, the reasons below it, and what failed."""

    readers: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    failed: int = 0

    def mark(self, reason: str) -> str:
        return f"[{self.reasons.setdefault(reason, len(self.reasons) + 1)}]"

    def attempt(self, what: Callable[[], str]) -> str:
        """What a check says; one that does not hold is counted, with its reason."""
        try:
            return what()
        except (CompressError, ValueError) as error:
            self.failed += 1
            return f"FAILS {self.mark(' '.join(str(error).split()))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--readers", default="transformers,auto-gptq,ours")
    parser.add_argument("--gptqmodel", action="store_true", help="its environment takes minutes to build, once")
    args = parser.parse_args()
    logging.disable_progress_bar()
    names = (*args.readers.split(","), *(["gptqmodel"] if args.gptqmodel else []))
    for name in names:
        readers.reader_named(name)
    matrix = Matrix(names)
    for model in args.models:
        source = open_checkpoint(model)
        for bits in BITS:
            for kind in ("", "-asym"):
                for form in formats():
                    with tempfile.TemporaryDirectory() as scratch:
                        row = one(source, f"w{bits}a16g{GROUP}{kind}", form, Path(scratch), matrix)
                    matrix.rows.append((model.name, f"w{bits}a16g{GROUP}{kind}", form, *row))
                    print(*matrix.rows[-1], sep="  ", file=sys.stderr, flush=True)
    table(("model", "scheme", "format", "packs", "bits/weight", "bytes", "round trip", *names), matrix.rows)
    for reason, number in matrix.reasons.items():
        print(f"[{number}] {reason}")
    print(
        f"\n{len(matrix.rows)} rows, {matrix.failed} failures; a reader's column: largest difference of logits, of the largest logit"
    )
    sys.exit(1 if matrix.failed else 0)


def one(source: Checkpoint, scheme: str, form: str, scratch: Path, matrix: Matrix) -> tuple[str, ...]:
    """A row without its first three cells."""
    least = ", least_zero=1" if form == "gptq" and scheme.endswith("-asym") else ""
    quantize, refusal = f"quantize.rtn(scheme={scheme}{least})", ""
    for options in ("", ", dequantize=true") if form == "compressed-tensors" else ("",):
        pack = f"pack(format={form}{options})"
        try:
            result = go(source, scratch / f"art{len(options)}", f"{quantize} | {pack}")
            break
        except (FormatError, CoverageError) as error:
            refusal = "; ".join(part for part in (error.problems[0].got, error.problems[0].do) if part)
    else:
        return f"refused {matrix.mark(refusal)}", *("" for _ in range(3 + len(matrix.readers)))
    artifact, step = open_checkpoint(result.out), result.plan.steps[-1]
    canonical = next(p for p in output_paths.steps_folder(result.out).iterdir() if p.is_dir() and "-quantize.rtn-" in p.name)
    ids = tokens(source, None)
    cells = [
        matrix.attempt(lambda: f"{verify_bytes(artifact, Context()).decoded} decode"),
        matrix.attempt(lambda: round_trip(artifact, open_checkpoint(canonical), pack, scratch)),
    ]
    verdicts = {verdict.reader: verdict for verdict in result.plan.verdicts}
    for name in matrix.readers:
        cells.append(read(name, form, verdicts.get(name), result.out, canonical, ids, matrix))
    packs = "dequantize" if options else "yes"
    return packs, f"{result.plan.bits(step, step.transformed):.3f}", *cells


def go(source: Checkpoint, out: Path, recipe: str) -> Result:
    return run_recipe(parse_one_liner(recipe), source, out, Context())


def round_trip(artifact: Checkpoint, canonical: Checkpoint, pack: str, scratch: Path) -> str:
    """Raises ValueError where unpack gives other numbers than were packed, or packing again gives other bytes."""
    before = DenseView(canonical)
    after = DenseView(open_checkpoint(go(artifact, scratch / "unpacked", "unpack").out))
    if set(before.weights) != set(after.weights) or list(before.logical) != list(after.logical):
        raise ValueError("unpack gives other weights than were packed")
    # Where the manifest counts scales that were rounded to fp16, those are what comes back.
    halved = artifact.manifest is not None and any(note.what == "scales" for note in artifact.manifest.notes)
    for name in before.logical:
        a, b = before.qtensor(name), after.qtensor(name)
        if a is None or b is None:
            same = a is b and torch.equal(before.dense(name), after.dense(name))
        else:
            scale = a.scale.half().to(a.scale.dtype) if halved else a.scale
            zeros = (a.zero is None and b.zero is None) or (
                a.zero is not None and b.zero is not None and torch.equal(a.zero, b.zero)
            )
            same = a.scheme == b.scheme and torch.equal(a.codes, b.codes) and torch.equal(scale, b.scale) and zeros
        if not same:
            raise ValueError(f"unpack changes '{name}'")
    again = open_checkpoint(go(artifact, scratch / "again", f"unpack | {pack}").out)
    if {ref.name: (ref.dtype, ref.shape) for ref in again.refs.values()} != {
        ref.name: (ref.dtype, ref.shape) for ref in artifact.refs.values()
    }:
        raise ValueError("packing again gives other tensors")
    for name in artifact.refs:
        if any(bytes(x) != bytes(y) for x, y in zip(artifact.chunks(name), again.chunks(name), strict=True)):
            raise ValueError(f"packing again gives other bytes of '{name}'")
    return "identical"


def read(
    name: str, form: str, verdict: Verdict | None, artifact: Path, canonical: Path, ids: torch.Tensor, matrix: Matrix
) -> str:  # fmt: skip
    """What a reader makes of an artifact, or why it is not asked."""
    if name == "ours":
        return matrix.attempt(lambda: as_meant(artifact, canonical, ids))
    if verdict is None:
        return f"no {matrix.mark(f'{name} does not read {form}')}"
    if verdict.loads != "yes":
        return f"{verdict.loads} {matrix.mark(verdict.reason)}"
    if form not in readers.READERS[name].formats:
        return f"not run {matrix.mark(verdict.reason)}"

    def compare() -> str:
        found = read_with(name, artifact, ids, lambda line: None)
        return f"{found.difference:.1e} of {found.largest:.3g} {found.dtype}"

    return matrix.attempt(compare)


def as_meant(artifact: Path, canonical: Path, ids: torch.Tensor) -> str:
    """Raises ValueError where our own reading of an artifact is not the canonical step's, exactly."""
    a, b = (readers.logits("ours", path, ids, lambda line: None).logits for path in (artifact, canonical))
    if not torch.equal(a, b):
        raise ValueError(f"we read other logits from the artifact than from the canonical step: {float((a - b).abs().max()):.2g}")
    return f"0 of {float(a.abs().max()):.3g}"


if __name__ == "__main__":
    main()
