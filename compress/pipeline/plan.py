"""Plan: replays states of weights over a recipe; exact bytes, from headers only.

A run executes its plan: the shards that the plan lays out are the ones that get written, so its sizes are exact
by construction. What cannot be done is refused here, with every weight named, before any data is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from compress.architecture.families import Layout
from compress.architecture.rotations import Rotations
from compress.architecture.weight_map import Model
from compress.checkpoint.reader import CANONICAL, Checkpoint
from compress.checkpoint.safetensors_header import CANONICAL_STEM, STEM, Shard, arrange, single
from compress.contract.allocator import InputAllocator, offers_of
from compress.contract.cache_pass import CachePass, refused, scales_of
from compress.contract.format import Format, Verdict
from compress.contract.notes import changed_by, folded, shared_notes, unmeasured, untouched
from compress.contract.pass_base import Pass, WeightPass
from compress.contract.rotating_pass import RotatingPass
from compress.contract.shapes import DataPass
from compress.contract.slicing_pass import SlicingPass
from compress.contract.step_plan import Plan, StepPlan, layout_specs
from compress.errors import CoverageError, FormatError, Problem, RecipeError, Refusal, UsageError
from compress.layerwise.dense_view import DenseView
from compress.pipeline.plan_checks import calibrated, refuse_after_cache, refuse_cache, refuse_unread, refuse_zeros
from compress.pipeline.plan_memory import Surroundings, needs_of, tokens_of
from compress.pipeline.plan_rotating import rotated
from compress.pipeline.plan_slicing import smaller_model
from compress.pipeline.resolve import resolve
from compress.spec.recipe import Recipe
from compress.spec.selectors import compiled
from compress.spec.weight_state import DENSE, Note, State, TensorSpec, Weight, counted
from compress.threads import available

SHARD_BYTES = 5_000_000_000
_UNDECIDED = "sizes are an upper bound, for the largest choice, until the step has decided"
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that describe how weights are packed."""
_DATA_BYTES = 64 << 20
"""Bytes of memory of a step that only makes tokens."""

Refused = list[tuple[str, str, str]]
"""(weight, reason, what to do) for everything that prevents a step."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan besides the recipe and the model."""

    threads: int = field(default_factory=available)
    allow_skips: Sequence[str] = ()
    """Regexes of weights that stay unchanged if a pass refuses them."""
    shard_bytes: int = SHARD_BYTES
    dtype: str = "auto"
    """Compute dtype of calibrated passes."""


def make_plan(
    recipe: Recipe, checkpoint: Checkpoint, model: Model, options: PlanOptions | None = None,
    dropped: frozenset[str] | None = None, dense_view: DenseView | None = None,
    decided: Mapping[int, Mapping[str, State]] | None = None,
) -> Plan:  # fmt: skip
    """Replays the states of weights over all lines of a recipe.

    `dropped` are weights that are not written, because another one holds the same; `dense_view` is that of a packed source;
    `decided` are the states that allocators have decided, by number of the step. Raises RecipeError, CoverageError or FormatError
    with everything that is wrong.
    """
    dropped = frozenset(model.duplicates) if dropped is None else dropped
    return _Planner(recipe, checkpoint, model, options or PlanOptions(), dropped, dense_view, decided or {}).plan()


class _Planner:
    """Plans the lines of a recipe in turn, and keeps track of the states of all weights."""

    def __init__(
        self, recipe: Recipe, checkpoint: Checkpoint, model: Model, options: PlanOptions, dropped: frozenset[str],
        dense_view: DenseView | None, decided: Mapping[int, Mapping[str, State]],
    ) -> None:  # fmt: skip
        self.recipe, self.checkpoint, self.options = recipe, checkpoint, options
        self.dense_view, self.decided, self.config = dense_view, decided, checkpoint.config
        self.passes = resolve(recipe)
        self.weights = [weight for weight in model.weights if weight.name not in dropped]
        self.source, self.written = model, replace(model, weights=tuple(self.weights))
        logical = checkpoint.logical if dense_view is None else dense_view.logical
        self.states = {name: entry.state for name, entry in logical.items() if name not in dropped}
        self.shared = shared_notes(checkpoint, model, dropped)
        self.changed = changed_by(checkpoint.manifest.notes if checkpoint.manifest else ())
        """Weights that an earlier step has trained or smoothed."""
        self.tokens, self.length = tokens_of(checkpoint)
        self.last: StepPlan | None = None
        """The last step so far."""
        self.skips = [compiled(text, f"--allow-skips '{text}'") for text in options.allow_skips]

    def plan(self) -> Plan:
        steps: list[StepPlan] = []
        problems: list[Problem] = []
        kind: type[CoverageError | FormatError] | None = None
        verdicts: tuple[Verdict, ...] = ()
        for number, pass_ in enumerate(self.passes, start=1):
            self.check_packed(number)
            if isinstance(pass_, DataPass):
                self.last = self.data_step(number, pass_)
                steps.append(self.last)
                continue
            assert isinstance(pass_, WeightPass)
            where, fmt = self.where(number, pass_), pass_.target_format()
            fmt = fmt.written_for(self.written, self.checkpoint, self.config) if fmt is not None else None
            self.check_place(number, pass_)
            if isinstance(pass_, SlicingPass):
                planned: _SlicePlanner | _StepPlanner = _SlicePlanner(self, number, pass_)
            else:
                planned = (_CachePlanner if isinstance(pass_, CachePass) else _StepPlanner)(self, number, pass_, fmt)
            step, wrong = planned.step()
            if wrong and kind is None:
                kind = FormatError if fmt is not None else CoverageError
            elif fmt is not None and kind is not None:
                # After an earlier line's refusals, those of packing would only be consequences.
                continue
            problems += [Problem(f"{where}: '{name}'", "", reason, do) for name, reason, do in wrong]
            self.states = planned.after
            if step is not None:
                steps.append(step)
                self.last = step
                self.changed |= changed_by(step.notes)
            if fmt is not None:
                verdicts = tuple(fmt.readers(self.weights, self.states))
        if kind is not None:
            raise kind(folded(problems))
        self.check_skips(steps)
        self.check_push(steps[-1])
        return Plan(
            self.source, list(self.passes), steps, self.checkpoint.nbytes, self.options.threads, verdicts
        )  # fmt: skip

    def where(self, number: int, pass_: Pass) -> str:
        """The position of a line, for messages."""
        return f"{self.recipe.lines[number - 1].where or number}: {pass_.pass_name()}"

    def check_packed(self, number: int) -> None:
        """Raises RecipeError for a line after one that packs."""
        before = self.passes[number - 2] if number > 1 else None
        if isinstance(before, WeightPass) and before.target_format() is not None:
            where = self.where(number, self.passes[number - 1])
            raise RecipeError(where, "pack as the last pass", f"a pass after {before.pass_name()}", "move it before pack")

    def check_place(self, number: int, pass_: WeightPass) -> None:
        """Raises RecipeError for a pass at a position where it cannot run."""
        where, before = self.where(number, pass_), self.passes[: number - 1]
        if not self.tokens and pass_.reads_tokens():
            raise RecipeError(where, "calibration tokens", "none", calibrated(self.recipe, number, pass_))
        if (fmt := pass_.target_format()) is not None:
            refuse_zeros(fmt, self.recipe, before)
        refuse_after_cache(where, pass_, self.weights)
        if pass_.unpacks and number > 1:
            raise RecipeError(where, "unpack as the first pass", "one before it", "what a recipe has made is not packed yet")

    def check_skips(self, steps: Sequence[StepPlan]) -> None:
        """Raises UsageError for a regex of --allow-skips that was not needed."""
        skipped = {name for step in steps for name in step.skipped}
        for regex in self.skips:
            if not any(regex.search(name) for name in skipped):
                raise UsageError(
                    f"--allow-skips '{regex.pattern}'", "a weight that cannot be transformed", "none that matches", "leave it out"
                )

    def check_push(self, last: StepPlan) -> None:
        """Raises RecipeError where what is to be pushed is not packed."""
        if self.recipe.push is not None and last.format is None and any(state.scheme for state in last.after.values()):
            where = self.recipe.push.where or "push"
            raise RecipeError(where, "packed weights, which a reader loads", "codes", "make pack the last pass")

    def surroundings(self) -> Surroundings:
        """The facts besides the pass that a step's memory depends on."""
        options = self.options
        return Surroundings(self.checkpoint, self.config, self.weights, options.threads, options.dtype, self.tokens, self.length)

    def data_step(self, number: int, pass_: DataPass) -> StepPlan:
        """A step that makes tokens. It writes the weights only if it is the last step, since OUT must have them."""
        self.tokens, self.length = pass_.tokens_at_most()
        self.shared = [*self.shared, *pass_.source_notes()]
        stored = layout_specs(None, self.weights, self.states, self.last)
        canonical = any(state.scheme for state in self.states.values())
        last, stem = number == len(self.passes), CANONICAL_STEM if canonical else STEM
        shards = arrange(chain.from_iterable(stored.values()), self.options.shard_bytes, stem) if last else []
        texts = _texts(self.config, None, self.written, self.states)
        return StepPlan(
            number, pass_, tuple(self.weights), (), {}, self.states, self.states, None, shards, stored, texts, tuple(self.shared),
            _DATA_BYTES,
        )  # fmt: skip


class _StepPlanner:
    """Plans one pass: its weights, their states, the layout of shards, the resources it needs."""

    def __init__(self, planner: _Planner, number: int, pass_: WeightPass, fmt: Format | None) -> None:
        self.planner, self.number, self.pass_, self.format = planner, number, pass_, fmt
        self.layout: Layout | Rotations | None
        if isinstance(pass_, RotatingPass):
            planner.written, planner.config, self.layout = rotated(pass_, planner.checkpoint, planner.written, planner.config)
            planner.weights = list(planner.written.weights)
            planner.states = {weight.name: planner.states.get(weight.name, DENSE) for weight in planner.weights}
            planner.shared = [
                note for note in planner.shared if note.what != "tied" or planner.states.keys().isdisjoint(note.names)
            ]
        else:
            self.layout = pass_.layout(planner.weights, planner.written.family, planner.config)
        self.before, self.after = planner.states, dict(planner.states)
        self.plain: dict[str, str] = {}
        self.allocator = pass_.allocator()

    def step(self) -> tuple[StepPlan | None, Refused]:
        """The planned step, or the refusals that prevent it."""
        chosen, wrong = self.choose()
        if wrong:
            return None, wrong
        refused = self.become(chosen)
        # A format's refusal cannot be skipped: the weight is already in codes, and no reader would load it.
        if wrong := [r for r in refused if self.format is not None or not any(s.search(r[0]) for s in self.planner.skips)]:
            return None, wrong
        skipped = {name: reason for name, reason, _ in refused}
        touched = [weight for weight in chosen if weight.name not in skipped]
        decided = self.settle(touched)
        notes = self.notes(touched, skipped, decided)
        stored = layout_specs(self.format, self.planner.weights, self.after, self.planner.last)
        needs = needs_of(self.pass_, touched, self.after, stored, self.format, self.planner.surroundings())
        texts = _texts(self.planner.config, self.format, self.planner.written, self.after)
        step = StepPlan(
            self.number, self.pass_, tuple(self.planner.weights), tuple(w.name for w in chosen), skipped, self.before, self.after,
            self.format, self.shards(stored), stored,
            texts, tuple(notes), needs.resident_bytes, needs.scratch_bytes, needs.device_bytes,
            rotations=self.layout if isinstance(self.layout, Rotations) else None,
        )  # fmt: skip
        if self.allocator is not None and not decided:
            # Raises if nothing fits the budget, which is known without gradients.
            self.allocator.decide(*offers_of(step, self.planner.weights))
        return step, []

    def choose(self) -> tuple[list[Weight], Refused]:
        """The weights that the pass works on."""
        planner = self.planner
        chosen = self.pass_.chosen(planner.weights) if self.layout is None else self.layout.weights
        if self.pass_.unpacks and planner.dense_view is not None:
            chosen = [weight for weight in chosen if planner.dense_view.is_packed(weight.name)]
        if self.format is not None:
            plain = {weight.name: self.format.plain(weight, self.before[weight.name]) for weight in chosen}
            self.plain = {name: reason for name, reason in plain.items() if reason}
            chosen = [weight for weight in chosen if weight.name not in self.plain]
            if wrong := refuse_cache(self.format, planner.weights):
                return [], wrong
            if scales_of(planner.weights):
                return chosen, []
            if not chosen:
                return [], [("*", "nothing is quantized, so there is nothing to pack", "quantize first")]
        if not chosen:
            do = "give skip_defaults=off" if self.pass_.left_alone(planner.weights) else "see `compress plan MODEL ... --layers`"
            return [], [("*", "targets and skip leave no weight to work on", do)]
        return chosen, []

    def become(self, chosen: Sequence[Weight]) -> Refused:
        """Sets the states after the pass; returns the refusals of pass and format."""
        refused: Refused = []
        observes = self.pass_.executor() in ("sweep", "smooth") or isinstance(self.allocator, InputAllocator)
        worker, known = self.pass_.worker(), dict[State, State]()
        for weight in chosen:
            try:
                if observes:
                    refuse_unread(weight, self.planner.written, worker)
                state = self.pass_.becomes(weight, self.before[weight.name])
                # One object for all weights in a state, which are then compared and looked up at once.
                self.after[weight.name] = known.setdefault(state, state)
            except Refusal as refusal:
                refused.append((weight.name, refusal.reason, refusal.do))
        if self.format is not None and not refused:
            refused += self.format.refuse_together(self.planner.written, self.after)
        return refused

    def settle(self, touched: Sequence[Weight]) -> Mapping[str, State] | None:
        """Sets the states that the allocator has decided, or that it was given; returns None if it has not decided yet."""
        if self.allocator is None:
            return None
        decided = self.planner.decided.get(self.number)
        decided = self.allocator.known(touched) if decided is None else decided
        self.after.update(decided or {})
        return decided

    def notes(self, touched: list[Weight], skipped: dict[str, str], decided: Mapping[str, State] | None) -> list[Note]:
        """The counted lines of the step."""
        planner, before, after = self.planner, self.before, self.after
        names = {weight.name for weight in touched}
        own = self.pass_.notes(touched, after) if self.layout is None else self.layout.within(names).notes
        notes = [*own, *counted("skipped", skipped), *planner.shared]
        notes += counted("left alone by default", self.pass_.left_alone(planner.weights))
        notes += self.format.notes([*touched, *scales_of(planner.weights)], after) if self.format is not None else []
        notes += counted("plain", {name: reason for name, reason in self.plain.items() if before[name].sparsity is not None})
        lost = [weight.name for weight in touched if _inputs(before[weight.name]) and not _inputs(after[weight.name])]
        notes += counted("dropped", dict.fromkeys(lost, "rounding of activations: the weights go on alone"))
        notes += unmeasured(touched, before, after) if self.pass_.executor() != "sweep" else []
        if self.pass_.unpacks and planner.dense_view is not None and planner.dense_view.foreign is not None:
            notes += planner.dense_view.foreign.notes
        if self.allocator is not None:
            kind = "decided" if decided else "undecided"
            notes += counted(kind, {w.name: str(after[w.name]) if decided else _UNDECIDED for w in touched})
        changed = changed_by(notes) | planner.changed
        return notes + untouched([weight for weight in planner.weights if weight.name not in changed], after)

    def shards(self, stored: Mapping[str, list[TensorSpec]]) -> list[Shard]:
        """The layout of all tensors."""
        planner, fmt = self.planner, self.format
        if fmt is not None and (made := fmt.shards(planner.weights, self.after)):
            return made
        last = planner.last
        if fmt is None and last is not None and last.shards and all(last.stored.get(name) is it for name, it in stored.items()):
            return last.shards
        canonical = fmt is None and any(self.after[w.name].scheme for w in planner.weights)
        specs = list(chain.from_iterable(stored.values()))
        apart = {spec.name: file for spec in specs if fmt is not None and (file := fmt.file_of(spec.name))}
        stem = CANONICAL_STEM if canonical else STEM
        shards = arrange((s for s in specs if s.name not in apart), planner.options.shard_bytes, stem)
        return shards + [single(file, (s for s in specs if apart.get(s.name) == file)) for file in sorted(set(apart.values()))]


class _CachePlanner(_StepPlanner):
    """Plans a pass that adds scales of keys and values, each behind the weights of its attention."""

    def choose(self) -> tuple[list[Weight], Refused]:
        planner, model = self.planner, self.planner.written
        assert isinstance(self.pass_, CachePass)
        if wrong := refused(model):
            return [], wrong
        added = self.pass_.added(model)
        self.told = self.pass_.cache_notes(model)
        planner.weights = [one for weight in planner.weights for one in (weight, *added.get(weight.name, ()))]
        planner.written = replace(model, weights=tuple(planner.weights))
        found = scales_of(planner.weights)
        self.before = {**self.before, **dict.fromkeys((weight.name for weight in found), DENSE)}
        return found, []

    def notes(self, *args: Any) -> list[Note]:
        return [*self.told, *super().notes(*args)]


class _SlicePlanner:
    """Plans a pass that makes a smaller model, from which the lines after it go on."""

    def __init__(self, planner: _Planner, number: int, pass_: SlicingPass) -> None:
        self.planner, self.number, self.pass_ = planner, number, pass_
        self.before = self.after = planner.states

    def step(self) -> tuple[StepPlan | None, Refused]:
        """The planned step, or the refusal that prevents it."""
        planner, options = self.planner, self.planner.options
        config = {key: value for key, value in planner.config.items() if key not in _QUANTIZED}
        try:
            made = smaller_model(self.pass_, planner.checkpoint, planner.written, planner.weights, config, self.before)
        except Refusal as refusal:
            return None, [("*", refusal.reason, refusal.do)]
        weights = made.model.weights
        self.after = {weight.name: DENSE for weight in weights}
        stored = layout_specs(None, weights, self.after, None)
        needs = needs_of(self.pass_, list(made.cut.weights), self.before, {}, None, planner.surroundings())
        step = StepPlan(
            self.number, self.pass_, weights, tuple(self.after), {}, self.before, self.after, None,
            arrange(chain.from_iterable(stored.values()), options.shard_bytes, STEM), stored,
            _texts(made.config, None, made.model, self.after),
            (*made.notes, *planner.shared), needs.resident_bytes, needs.scratch_bytes, needs.device_bytes, made.cut,
        )  # fmt: skip
        planner.weights, planner.written, planner.config = list(weights), made.model, made.config
        return step, []


def _inputs(state: State) -> str:
    """The rounding of a weight's inputs in this state, such as int8; empty for none."""
    return state.scheme.inputs if state.scheme is not None else ""


def _texts(config: dict[str, Any], fmt: Format | None, model: Model, states: dict[str, State]) -> dict[str, str]:
    """config.json after a step, and a format's own files.

    A canonical checkpoint is marked as such; otherwise readers would initialise missing weights at random.
    """
    content = {key: value for key, value in config.items() if key not in _QUANTIZED}
    if isinstance(text := content.get("text_config"), dict):
        content["text_config"] = {key: value for key, value in text.items() if key not in _QUANTIZED}
    if fmt is not None:
        content = fmt.configured(content, model, states)
    elif any(state.scheme for state in states.values()):
        content["quantization_config"] = {"quant_method": CANONICAL, "format": "canonical"}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return {"config.json": text, **(fmt.files(model, states) if fmt is not None else {})}
