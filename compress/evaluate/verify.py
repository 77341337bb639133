"""Verify: an artifact's bytes, what they decode to, what its reader computes.

Three questions, each worth nothing without the one before. Are the bytes those that the manifest names? Does every tensor
decode to numbers, with the zeros it promises, and does what config.json alone says of them mean the same as what our
manifest says? Does the reader's own code, from the files alone, compute the logits that this meaning gives?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import ADAPTER, Checkpoint, read_json
from compress.checkpoint.scan import scan_source
from compress.context import Context
from compress.errors import FormatError, Problem
from compress.importers import METHODS, method_of, open_foreign
from compress.layerwise.dense_view import DenseView
from compress.numerics.divergence import Divergence, divergence
from compress.numerics.qtensor import QTensor, along_inputs

if TYPE_CHECKING:
    from compress.importers import Packed

_ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}
"""How far logits may differ, as a share of the largest: readers multiply in another order, and some in half precision."""


@dataclass(frozen=True)
class Bytes:
    """What the first two questions found."""

    tensors: int
    named: bool
    """Whether a manifest says what the bytes should be."""
    decoded: int
    """Weights in codes, or in another tool's numbers, that decode."""
    corrected: tuple[tuple[str, int], ...] = ()
    """Labels of other tools that say something else than what is stored, and on how many weights."""


@dataclass(frozen=True)
class Reading:
    """What the third found."""

    reader: str
    dtype: str
    """What both have computed in."""
    versions: dict[str, str]
    notes: tuple[str, ...]
    tokens: int
    difference: float
    """Largest difference of logits."""
    largest: float
    """Largest logit."""
    kl: float
    """KL(meaning || reader), mean over tokens, in nats."""
    top1: float
    allowed: float
    """Largest difference allowed, as a share of the largest logit."""

    @property
    def equal(self) -> bool:
        """Whether the reader computes what the artifact means, up to rounding."""
        return self.difference <= self.allowed * self.largest


def verify_bytes(checkpoint: Checkpoint, ctx: Context) -> Bytes:
    """Reads every byte and decodes every weight. Raises InputError or FormatError for what is not as it should be."""
    scan_source(checkpoint, ctx)
    dense_view = DenseView(checkpoint)
    # What config.json alone says: a reader has no manifest.
    told = open_foreign(checkpoint).weights if dense_view.format is not None and method_of(checkpoint) in METHODS else {}
    problems = []
    for number, name in enumerate(dense_view.logical, 1):
        if problem := _wrong(dense_view, name, told):
            problems.append(problem)
        ctx.tell("progress", step="verify", phase="decode", done=number, total=len(dense_view.logical), unit="weights")
    described = dense_view.format.described(checkpoint) if dense_view.format is not None else {}
    for name in sorted(described.keys() | dense_view.weights.keys()) if described else ():
        if described.get(name) != dense_view.weights.get(name):
            expected, got = "the same by config.json as by manifest.json", "another state, shape or dtype"
            problems.append(Problem(f"'{name}'", expected, got, "make the artifact anew"))
    if problems:
        raise FormatError(problems[:20])
    foreign = dense_view.foreign
    corrected = tuple((note.reason, note.count) for note in (foreign.notes if foreign is not None else ()))
    decoded = len(dense_view.weights) if foreign is None else len(foreign.weights)
    return Bytes(len(checkpoint.refs), checkpoint.manifest is not None, decoded, corrected)


def _wrong(dense_view: DenseView, name: str, told: dict[str, Packed]) -> Problem | None:
    """What is wrong with one weight."""
    from compress.numerics import masks

    where, do = f"'{name}'", "make the artifact anew"
    q = dense_view.qtensor(name)
    if q is None:
        value = dense_view.dense(name) if dense_view.is_packed(name) else None
        finite = value is None or bool(torch.isfinite(value.float()).all())
        return None if finite else Problem(where, "finite weights", "NaN or Inf", do)
    weight, state = dense_view.weights[name]
    top = q.scheme.levels
    plain = q.scheme.integer and q.outliers is None and q.lowrank is None
    finite = bool(torch.isfinite(q.steps() if plain else q.dequantize()).all())
    if not finite or int(q.codes.max()) >= top or (q.zero is not None and int(q.zero.max()) >= top):
        return Problem(where, f"finite scales, codes and zero points below {top}", "others", do)
    if state.sparsity is not None and not masks.holds(along_inputs(weight, q.nonzero()), state.sparsity):
        return Problem(where, f"the zeros of masked({state.sparsity})", "other zeros", do)
    if told:
        if name not in told:
            return Problem(where, "codes, as manifest.json says", "a dense weight by config.json", do)
        said = told[name].scheme
        if q.scheme.inputs != (said.inputs if said is not None else ""):
            return Problem(where, f"activations as in {q.scheme}, as manifest.json says", f"{said} by config.json", do)
        other = told[name].read(dense_view.checkpoint.read)
        value = other.dequantize() if isinstance(other, QTensor) else other.float()
        if not torch.equal(value, q.dequantize().to(value.dtype)):
            return Problem(where, "the same weight by config.json as by manifest.json", "another one", do)
    return None


def read_with(
    reader: str, artifact: Path, ids: torch.Tensor, tell: Callable[[str], None], base: Path | None = None,
    dtype: str = "auto", timeout_seconds: float = 3600, trusted: bool = False,
) -> Reading:  # fmt: skip
    """Logits of the reader's own code for ids [samples, length], against those of our own reading.

    `dtype` is what both compute in; auto is what the reader does by itself. Python of the artifact's own is run by both
    only where it is `trusted`.

    Raises FormatError for an artifact that the reader refuses or computes something else from, MachineError for a reader that
    cannot be run.
    """
    from compress.evaluate import readers

    if base is None and readers.reader_named(reader).needs_base and (artifact / ADAPTER).is_dir():
        artifact, base = artifact / ADAPTER, artifact
    config = read_json((base or artifact) / "config.json")
    if dtype == "auto":
        stored = config.get("dtype") or config.get("torch_dtype")
        dtype = readers.reader_named(reader).dtype or (stored if isinstance(stored, str) and stored in _ROUNDING else "float32")
    try:
        theirs = readers.logits(reader, artifact, ids, tell, base, dtype, timeout_seconds, trusted=trusted)
    except FormatError as error:
        manifest = Manifest.read(base or artifact)
        known = [n.reason for n in (manifest.notes if manifest else ()) if n.what == "not read" and f"by {reader}:" in n.reason]
        raise FormatError(replace(p, do=f"it is known, {known[0]}") if known else p for p in error.problems) from None
    # Readers multiply by what codes mean as it is, unless they expand them while they load.
    quantization = config.get("quantization_config")
    rounded = isinstance(quantization, dict) and bool(quantization.get("dequantize"))
    ours = readers.logits("ours", artifact, ids, tell, base, dtype, rounded=rounded, trusted=trusted).logits
    kl = divergence(ours, theirs.logits, Divergence())
    found = Reading(
        reader, dtype, theirs.versions, tuple(theirs.notes), ids.numel(),
        float((ours - theirs.logits).abs().max()), float(ours.abs().max()),
        float(kl.mean()), float((ours.argmax(-1) == theirs.logits.argmax(-1)).float().mean()),
        _ROUNDING[dtype],
    )  # fmt: skip
    if not found.equal:
        raise FormatError(
            f"{artifact.name}, read by {reader}", f"logits that differ by at most {found.allowed * found.largest:.3g}",
            f"{found.difference:.3g} (KL {found.kl:.3g}, same top-1 {found.top1:.1%})",
            "do not use it with this reader: it loads other weights than those that were packed",
        )  # fmt: skip
    return found
