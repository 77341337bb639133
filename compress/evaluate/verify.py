"""Verify: checks an artifact's bytes, its decoded weights and a reader's logits.

Three checks, each of which relies on the one before. Are the bytes those that the manifest names? Does every tensor decode to
finite numbers, with the zeros that its state promises, and does config.json alone describe the same weights as our manifest?
Does the reader's own code, from the files alone, compute the logits of the decoded weights?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.architecture.attention import SCALES
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import ADAPTER, Checkpoint, read_json, size_of
from compress.checkpoint.scan import scan_source
from compress.context import Context
from compress.errors import FormatError, Problem, UsageError
from compress.evaluate import listed
from compress.evaluate.records import ReaderRecord, now
from compress.importers import METHODS, method_of, open_foreign
from compress.layerwise.dense_view import DenseView
from compress.numerics.divergence import Divergence, divergence
from compress.numerics.qtensor import QTensor, along_inputs

if TYPE_CHECKING:
    from compress.evaluate import readers
    from compress.importers import Packed

_ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}
"""Allowed difference of logits, as a share of the largest: readers sum in another order, and some in half precision."""
_MARGIN = 3.0
"""How many times what a compute dtype does to our own reading it may do to a reader. vLLM's engine was seen at 0.9 times where
nothing is quantized, at 2.3 where its kernels round the inputs of 4-bit linears to 8 bits; with a fault in one matrix at 7."""
_TOKENS, _WINDOW = 256, 64


@dataclass(frozen=True)
class Bytes:
    """The result of the first two checks."""

    tensors: int
    named: bool
    """Whether a manifest says what the bytes should be."""
    decoded: int
    """How many weights in codes, or in another tool's format, decode."""
    corrected: tuple[tuple[str, int], ...] = ()
    """Where another tool's config contradicts the stored tensors, and for how many weights."""


@dataclass(frozen=True)
class Reading:
    """The result of the third check."""

    reader: str
    dtype: str
    """The compute dtype of both."""
    versions: dict[str, str]
    notes: tuple[str, ...]
    tokens: int
    difference: float
    """Largest difference between logits, or between log-probabilities where the reader tells those."""
    largest: float
    """Largest of them."""
    kl: float
    """KL(meaning || reader), mean over tokens, in nats."""
    top1: float
    allowed: float
    """Largest difference allowed, as a share of the largest logit; at the median token for a reader that rounds activations."""
    typical: float = 0.0
    """|difference| / |logits| of the median token; of log-probabilities, their rms / the deviation of logits."""
    rounds: bool = False
    """Whether the reader rounds activations, so that single logits, and the choice of experts, may differ by more."""

    @property
    def equal(self) -> bool:
        """Whether the reader computes what the artifact means, up to rounding."""
        return self.typical <= self.allowed if self.rounds else self.difference <= self.allowed * self.largest


def as_record(reading: Reading) -> ReaderRecord:
    """What is kept of a reading that passed."""
    said = reading.versions
    version = said.get(reading.reader) or said.get("compress-llm") or next(iter(said.values()), "")
    return ReaderRecord(
        passed=True, version=version, when=now(), dtype=reading.dtype,
        versions=said, tokens=reading.tokens, difference=reading.difference, largest=reading.largest, kl=reading.kl,
        top1=reading.top1,
    )  # fmt: skip


def token_ids(checkpoint: Checkpoint, data: str | Path | None = None) -> torch.Tensor:
    """The token ids that logits are compared on, [samples, length]: of a text, or drawn by a seed. Raises UsageError."""
    if data is not None:
        from compress.layerwise.eval_windows import token_windows

        return token_windows(checkpoint.path, data, _WINDOW, _TOKENS, checkpoint.trusted)
    vocabulary = size_of(checkpoint.config, "vocab_size")
    if vocabulary is None:
        raise UsageError("--data", "a text, for config.json does not say how many token ids there are", "none")
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (_TOKENS // _WINDOW, _WINDOW), generator=drawn)


def verify_bytes(checkpoint: Checkpoint, ctx: Context) -> Bytes:
    """Reads every byte and decodes every weight. Raises InputError or FormatError for any that is wrong."""
    scan_source(checkpoint, ctx)
    dense_view = DenseView(checkpoint)
    # By config.json alone, because a reader has no manifest.
    by_config = open_foreign(checkpoint).weights if dense_view.format is not None and method_of(checkpoint) in METHODS else {}
    problems = []
    for number, name in enumerate(dense_view.logical, 1):
        if problem := _wrong(dense_view, name, by_config):
            problems.append(problem)
        ctx.tell("progress", step="verify", phase="decode", done=number, total=len(dense_view.logical), unit="weights")
    described = dense_view.format.described(checkpoint) if dense_view.format is not None else {}
    for name in sorted(described.keys() | dense_view.weights.keys()) if described else ():
        if described.get(name) != dense_view.weights.get(name):
            expected, got = "the same by config.json as by manifest.json", "another state, shape or dtype"
            problems.append(Problem(f"'{name}'", expected, got, "make the artifact anew"))
    if problems:
        raise FormatError(problems[:20])
    imported = dense_view.foreign
    corrected = tuple((note.reason, note.count) for note in (imported.notes if imported is not None else ()))
    decoded = len(dense_view.weights) if imported is None else len(imported.weights)
    return Bytes(len(checkpoint.refs), checkpoint.manifest is not None, decoded, corrected)


def _wrong(dense_view: DenseView, name: str, by_config: dict[str, Packed]) -> Problem | None:
    """The problem with one weight, None if there is none."""
    from compress.numerics import masks

    where, do = f"'{name}'", "make the artifact anew"
    q = dense_view.qtensor(name)
    if name.rpartition(".")[2] in SCALES:
        scale = dense_view.dense(name).float()
        return None if bool((scale.isfinite() & (scale > 0)).all()) else Problem(where, "positive scales", f"{scale.min():g}", do)
    if q is None:
        value = dense_view.dense(name) if dense_view.is_packed(name) else None
        finite = value is None or bool(torch.isfinite(value.float()).all())
        return None if finite else Problem(where, "finite weights", "NaN or Inf", do)
    weight, state = dense_view.weights[name]
    top = q.scheme.levels
    plain = q.scheme.integer and not state.beside()
    numbers = (q.steps(), q.minimum) if plain else (q.dequantize(),)
    finite = all(bool(torch.isfinite(part).all()) for part in numbers if part is not None)
    if not finite or int(q.codes.max()) >= top or (q.zero is not None and int(q.zero.max()) >= top):
        return Problem(where, f"finite scales, codes and zero points below {top}", "others", do)
    if q.input_scale is not None and not (bool(q.input_scale.isfinite()) and float(q.input_scale) > 0):
        return Problem(where, "a positive number that divides the scales of its inputs", f"{float(q.input_scale):g}", do)
    if state.sparsity is not None and not masks.holds(along_inputs(weight, q.nonzero()), state.sparsity):
        return Problem(where, f"the zeros of masked({state.sparsity})", "other zeros", do)
    if by_config:
        if name not in by_config:
            return Problem(where, "codes, as manifest.json says", "a dense weight by config.json", do)
        said = by_config[name].scheme
        if q.scheme.inputs != (said.inputs if said is not None else ""):
            return Problem(where, f"activations as in {q.scheme}, as manifest.json says", f"{said} by config.json", do)
        other = by_config[name].read(dense_view.checkpoint.read)
        if q.input_scale is not None and not (isinstance(other, QTensor) and other.input_scale == q.input_scale):
            return Problem(where, "the same scale of inputs by config.json as by manifest.json", "another one", do)
        value = other.dequantize() if isinstance(other, QTensor) else other.float()
        if not torch.equal(value, q.dequantize().to(value.dtype)):
            return Problem(where, "the same weight by config.json as by manifest.json", "another one", do)
    return None


def read_with(
    reader: str, artifact: Path, ids: torch.Tensor, tell: Callable[[str], None], base: Path | None = None,
    dtype: str = "auto", timeout_seconds: float = 3600, trusted: bool = False,
) -> Reading:  # fmt: skip
    """Logits of the reader's own code for ids [samples, length], against those of our own reading.

    `dtype` is the compute dtype of both; auto is the reader's own. Python files of the artifact are run by both
    only if it is `trusted`.

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
    # Readers multiply by unrounded dequantized values, unless they expand codes while loading.
    quantization = config.get("quantization_config")
    rounded = isinstance(quantization, dict) and bool(quantization.get("dequantize"))
    cache = readers.NO_CACHE not in theirs.notes

    def own(dtype: str) -> torch.Tensor:
        return readers.logits("ours", artifact, ids, tell, base, dtype, rounded=rounded, trusted=trusted, cache=cache).logits

    found = _compared(reader, dtype, theirs, own, ids)
    for kind, allowed, why in readers.reader_named(reader).coarse:
        if str(config.get("model_type")).startswith(kind):
            found = replace(found, allowed=allowed, notes=(*found.notes, why))
    if not found.equal:
        expected, got = f"at most {found.allowed * found.largest:.3g}", f"{found.difference:.3g}"
        if found.rounds:
            expected, got = f"at most {found.allowed:.2%} at the median token", f"{found.typical:.2%}"
        raise FormatError(
            f"{artifact.name}, read by {reader}", f"logits that differ by {expected}",
            f"{got} (KL {found.kl:.3g}, same top-1 {found.top1:.1%})",
            "do not use it with this reader: it loads other weights than those that were packed",
        )  # fmt: skip
    return found


def _compared(
    reader: str, dtype: str, theirs: readers.Reading, own: Callable[[str], torch.Tensor], ids: torch.Tensor
) -> Reading:  # fmt: skip
    """The reader's numbers beside those of `own`, our reading in a compute dtype."""
    from compress.evaluate import readers

    chosen = readers.reader_named(reader)
    ours = own("float32" if chosen.measured else dtype)
    allowed = chosen.rounding or _ROUNDING[dtype]
    common = reader, dtype, theirs.versions, tuple(theirs.notes), ids.numel()
    if theirs.tokens is None:
        typical = float(((ours - theirs.logits).norm(dim=-1) / ours.norm(dim=-1)).median())
        difference, largest = float((ours - theirs.logits).abs().max()), float(ours.abs().max())
        if not chosen.rounding and dtype != "float32" and difference > allowed * largest:
            # Some models amplify any rounding: a reader may do so as often as our own reading in that dtype.
            allowed = max(allowed, _MARGIN * float((ours - own("float32")).abs().max()) / largest)
        return Reading(
            *common, difference, largest,
            float(divergence(ours, theirs.logits, Divergence()).mean()),
            float((ours.argmax(-1) == theirs.logits.argmax(-1)).float().mean()), allowed, typical, bool(chosen.rounding),
        )  # fmt: skip
    tokens = theirs.tokens
    if chosen.measured:
        allowed = max(_ROUNDING["float32"], _MARGIN * listed.typical(ours, listed.of(own(dtype), tokens), tokens))
    said = listed.of(ours, tokens)
    return Reading(
        *common, float((said - theirs.logits).abs().max()), float(said.abs().max()),
        listed.divergence(ours, theirs.logits, tokens), float((ours.argmax(-1) == tokens[..., 1]).float().mean()),
        allowed, listed.typical(ours, theirs.logits, tokens), True,
    )  # fmt: skip
