"""Plan: replays facts over a recipe; exact bytes, from headers only.

The plan is what the run then does: the shards it lays out are the ones that get written, so its sizes are exact
by construction. What cannot be done is refused here, with every weight named, before any byte moves.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.architecture.weight_map import Model
from compress.checkpoint.reader import CALIBRATION, CANONICAL, Checkpoint, local_header
from compress.checkpoint.safetensors_header import CANONICAL_STEM, STEM, arrange, single
from compress.contract.allocation_pass import decides, offers_of
from compress.contract.format import Format, Verdict
from compress.contract.notes import changed_by, folded, shared_notes, untouched
from compress.contract.pass_base import DataPass, TrainPass, WeightPass, sweeps
from compress.contract.smoothing_pass import SmoothingPass
from compress.contract.step_plan import Plan, StepPlan, layout_specs
from compress.errors import CoverageError, FormatError, Problem, RecipeError, Refusal, UsageError
from compress.executors.teacher import teacher_weights
from compress.layerwise.dense_view import DenseView
from compress.layerwise.memory_estimate import DEVICE_BYTES, MAX_WORKERS, computing, reverse_bytes, sweep_bytes, train_bytes
from compress.numerics import qtensor
from compress.pipeline.plan_checks import refuse_unread, refuse_zeros
from compress.pipeline.resolve import reads_tokens, resolve, worker_of
from compress.spec.recipe import Recipe
from compress.spec.selectors import compiled
from compress.spec.weight_state import Note, State, Weight, counted

SHARD_BYTES = 5_000_000_000
_UNDECIDED = "sizes are an upper bound, for the largest choice, until the step has decided"
_QUANTIZED = ("quantization_config", "compression_config")
"""Keys of config.json that say how weights are packed."""


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    model: Model,
    threads: int,
    allow_skips: Sequence[str] = (),
    dropped: frozenset[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "auto",
    dense_view: DenseView | None = None,
    decided: Mapping[int, Mapping[str, State]] | None = None,
) -> Plan:
    """Replays facts over all lines; `dense_view` is that of a packed source, `decided` the states that steps have decided on.

    Raises RecipeError, CoverageError or FormatError with everything that is wrong.
    """
    passes = resolve(recipe)
    dropped = frozenset(model.duplicates) if dropped is None else dropped
    weights = [weight for weight in model.weights if weight.name not in dropped]
    logical = checkpoint.logical if dense_view is None else dense_view.logical
    states = {name: entry.state for name, entry in logical.items() if name not in dropped}
    skips = [compiled(text, f"--allow-skips '{text}'") for text in allow_skips]
    skipped: set[str] = set()
    steps: list[StepPlan] = []
    problems: list[Problem] = []
    verdicts: tuple[Verdict, ...] = ()
    kind: type[CoverageError | FormatError] | None = None
    shared = shared_notes(checkpoint, model, dropped)
    written = replace(model, weights=tuple(weights))
    packed_by = ""
    tokens, length = _tokens_of(checkpoint)
    changed = changed_by(checkpoint.manifest.notes if checkpoint.manifest else ())
    for number, pass_ in enumerate(passes, start=1):
        where = f"{recipe.lines[number - 1].where or number}: {pass_.pass_name()}"
        if packed_by:
            raise RecipeError(where, "pack as the last pass", f"a pass after {packed_by}", "move it before pack")
        if isinstance(pass_, DataPass):
            tokens, length = pass_.tokens_at_most()
            shared += pass_.notes()
            last = number == len(passes)
            steps.append(_data_step(number, pass_, last, weights, states, shared, checkpoint, written, shard_bytes))
            continue
        assert isinstance(pass_, WeightPass)
        if not tokens and reads_tokens(pass_):
            raise RecipeError(where, "calibration tokens", "none", _calibrated(recipe, number, pass_))
        fmt: Format | None = pass_.target_format()
        packed_by = pass_.pass_name() if fmt is not None else ""
        if fmt is not None:
            refuse_zeros(fmt, recipe, passes[: number - 1])
        if isinstance(pass_, WeightPass) and pass_.unpacks and number > 1:
            raise RecipeError(where, "unpack as the first pass", "one before it", "what a recipe has made is not packed yet")
        found = (decided or {}).get(number)
        run = _Run(checkpoint, written, shard_bytes, threads, tokens, length, dtype, frozenset(changed), dense_view, found)
        step, wrong, states = _step(number, pass_, fmt, weights, states, skips, shared, run)
        if wrong and kind is None:
            kind = FormatError if fmt is not None else CoverageError
        elif fmt is not None and kind is not None:
            # What packing would say of weights that an earlier line could not take is no news.
            continue
        problems += [Problem(f"{where}: '{name}'", "", reason, do) for name, reason, do in wrong]
        skipped.update(step.skipped if step is not None else ())
        if step is not None:
            steps.append(step)
            changed |= changed_by(step.notes)
        if fmt is not None:
            verdicts = tuple(fmt.readers(weights, states))
    if kind is not None:
        raise kind(folded(problems))
    for regex in skips:
        if not any(regex.search(name) for name in skipped):
            raise UsageError(
                f"--allow-skips '{regex.pattern}'", "a weight that cannot be transformed", "none that matches", "leave it out"
            )
    return Plan(model, list(passes), steps, checkpoint.nbytes, threads, verdicts, dropped)


@dataclass(frozen=True)
class _Run:
    """What every step of a plan has in common."""

    checkpoint: Checkpoint
    model: Model
    shard_bytes: int
    threads: int
    tokens: int
    length: int
    """Tokens of a calibration sample."""
    dtype: str
    changed: frozenset[str]
    """Weights that an earlier step has trained or smoothed."""
    dense_view: DenseView | None
    """Of a packed source."""
    decided: Mapping[str, State] | None
    """What this step has decided."""


def _calibrated(recipe: Recipe, number: int, pass_: WeightPass) -> str:
    """What to run where the pass of that line has no tokens."""
    lines = [str(line).removesuffix("()") for line in recipe.lines]
    whole = shlex.quote(" | ".join([*lines[: number - 1], "calibrate", *lines[number - 1 :]]))
    more = ", or give it data=..." if isinstance(pass_, TrainPass) else ""
    return f"compress run MODEL OUT -p {whole}; calibrate(data=...) reads your text, not the one that ships{more}"


def _tokens_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many calibration tokens a checkpoint brings, and how many in a sample."""
    if CALIBRATION not in checkpoint.side_files:
        return 0, 0
    return max((math.prod(ref.shape), math.prod(ref.shape[1:])) for ref in local_header(checkpoint.path / CALIBRATION))


def _data_step(
    number: int, pass_: DataPass, last: bool, weights: list[Weight], states: dict[str, State], shared: list[Note],
    checkpoint: Checkpoint, model: Model, shard_bytes: int,
) -> StepPlan:  # fmt: skip
    """A step that makes tokens; the weights are written only where it is the last one, and OUT has to have them."""
    specs = [spec for w in weights for spec in qtensor.specs(w, states[w.name])]
    canonical = any(state.scheme for state in states.values())
    shards = arrange(specs, shard_bytes, CANONICAL_STEM if canonical else STEM) if last else []
    texts = _texts(checkpoint.config, None, model, states)
    return StepPlan(number, pass_, (), {}, states, states, None, shards, texts, tuple(shared), 64 << 20)


def _step(
    number: int, pass_: WeightPass, fmt: Format | None, weights: list[Weight], before: dict[str, State],
    skips: list[re.Pattern[str]], shared: list[Note], run: _Run,
) -> tuple[StepPlan | None, list[tuple[str, str, str]], dict[str, State]]:  # fmt: skip
    """One step, or the (weight, reason, what to do) of everything that stands in its way; and the states after it."""
    layout = None
    if isinstance(pass_, SmoothingPass):
        layout = pass_.layout(weights, run.model.family, run.checkpoint.config)
    chosen = pass_.chosen(weights) if layout is None else layout.weights
    if pass_.unpacks and run.dense_view is not None:
        chosen = [weight for weight in chosen if run.dense_view.is_packed(weight.name)]
    plain: dict[str, str] = {}
    if fmt is not None:
        plain = {weight.name: reason for weight in chosen if (reason := fmt.plain(weight, before[weight.name]))}
        chosen = [weight for weight in chosen if weight.name not in plain]
        if not chosen:
            return None, [("*", "nothing is quantized, so there is nothing to pack", "quantize first")], before
    if not chosen:
        return None, [("*", "targets and skip leave no weight to work on", "see `compress plan MODEL ... --layers`")], before
    after, refused, worker = dict(before), [], worker_of(pass_)
    assert isinstance(worker, WeightPass)
    for weight in chosen:
        try:
            if sweeps(worker):
                refuse_unread(weight, run.model)
            after[weight.name] = pass_.becomes(weight, before[weight.name])
        except Refusal as refusal:
            refused.append((weight.name, refusal.reason, refusal.do))
    if fmt is not None and not refused:
        refused += fmt.refuse_together(run.model, after)
    # A format's refusal cannot be skipped: the weight is in codes already and no reader would have it.
    wrong = [r for r in refused if fmt is not None or not any(regex.search(r[0]) for regex in skips)]
    if wrong:
        return None, wrong, after
    skipped = {name: reason for name, reason, _ in refused}
    touched = [weight for weight in chosen if weight.name not in skipped]
    decided = run.decided
    if decides(pass_):
        decided = pass_.known(touched) if decided is None else decided
        after.update(decided or {})
    own = pass_.notes(touched, after) if layout is None else layout.within({weight.name for weight in touched}).notes
    notes = [*own, *counted("skipped", skipped), *shared]
    notes += fmt.notes(touched, after) if fmt is not None else []
    notes += counted("plain", {name: reason for name, reason in plain.items() if before[name].sparsity is not None})
    lost = [weight.name for weight in touched if _inputs(before[weight.name]) and not _inputs(after[weight.name])]
    notes += counted("dropped", dict.fromkeys(lost, "rounding of activations: the weights go on alone"))
    if pass_.unpacks and run.dense_view is not None and run.dense_view.foreign is not None:
        notes += run.dense_view.foreign.notes
    if decides(pass_):
        kind = "decided" if decided else "undecided"
        notes += counted(kind, {w.name: str(after[w.name]) if decided else _UNDECIDED for w in touched})
    changed = changed_by(notes) | run.changed
    notes += untouched([weight for weight in weights if weight.name not in changed], after)
    canonical = fmt is None and any(after[w.name].scheme for w in weights)
    specs = [spec for w in weights for spec in layout_specs(fmt, w, after[w.name])]
    apart = {spec.name: file for spec in specs if fmt is not None and (file := fmt.file_of(spec.name))}
    shards = arrange((s for s in specs if s.name not in apart), run.shard_bytes, CANONICAL_STEM if canonical else STEM)
    shards += [single(file, (s for s in specs if apart.get(s.name) == file)) for file in sorted(set(apart.values()))]
    work = max((_workspace(worker, weight, after[weight.name], fmt) for weight in touched), default=0)
    resident = min(run.threads, MAX_WORKERS) * max(work, 32 << 20)
    scratch = there = 0
    if sweeps(worker):
        config = run.checkpoint.config
        there = sweep_bytes(worker, weights, touched, config, run.tokens, computing(run.dtype, config).itemsize)
    if decides(pass_) and pass_.gradients and not pass_.table_digest():
        config = run.checkpoint.config
        needed, scratch = reverse_bytes(weights, touched, config, run.tokens, computing(run.dtype, config).itemsize)
        there = max(there, needed)
    resident = max(resident, there)
    if isinstance(pass_, TrainPass):
        config, texts = run.checkpoint.config, pass_.texts()
        sample, teacher = texts.length if texts else run.length, teacher_weights(pass_, run.checkpoint)
        size = computing(run.dtype, config).itemsize
        resident, scratch = train_bytes(pass_, weights, touched, after, config, teacher, sample, size)
        there = resident
    step = StepPlan(
        number, pass_, tuple(w.name for w in chosen), skipped, before, after, fmt, shards,
        _texts(run.checkpoint.config, fmt, run.model, after), tuple(notes), resident, scratch,
        there and there + DEVICE_BYTES,
    )  # fmt: skip
    if decides(pass_) and not decided:
        # Whether anything fits shows without a gradient.
        pass_.decide(*offers_of(step, weights))
    return step, [], after


def _inputs(state: State) -> str:
    """What activations are rounded to where a weight in this state reads them."""
    return state.scheme.inputs if state.scheme is not None else ""


def _workspace(pass_: WeightPass, weight: Weight, after: State, fmt: Format | None) -> int:
    """Bytes one worker holds at most: the dense tensor, the pass's own, the stream being packed and its parts."""
    stream = sum(spec.nbytes for spec in layout_specs(fmt, weight, after))
    dense = 0 if fmt is not None else weight.nbytes
    return dense + pass_.workspace_bytes(weight) + 2 * stream + (16 << 20)


def _texts(config: dict[str, Any], fmt: Format | None, model: Model, states: dict[str, State]) -> dict[str, str]:
    """config.json after a step, and a format's own files.

    A canonical checkpoint says that it is one, or readers would take missing weights for new ones.
    """
    content = {key: value for key, value in config.items() if key not in _QUANTIZED}
    if isinstance(text := content.get("text_config"), dict):
        content["text_config"] = {key: value for key, value in text.items() if key not in _QUANTIZED}
    if fmt is not None:
        content |= {"quantization_config": found} if (found := fmt.config(model, states)) else {}
    elif any(state.scheme for state in states.values()):
        content["quantization_config"] = {"quant_method": CANONICAL, "format": "canonical"}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return {"config.json": text, **(fmt.files(model, states) if fmt is not None else {})}
