"""Run: plans, skips finished steps, runs the others, publishes by one rename.

A step's id is hash(parent's content, pass with all options and its revision, seed, other inputs). Running the same
recipe again finds the same ids: a finished step is skipped, an interrupted one resumes at the tensor where it stopped.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.manifest import Manifest, Step, hash_json
from compress.checkpoint.reader import ALLOCATION, CALIBRATION, Checkpoint, open_checkpoint
from compress.checkpoint.remote_code import tell_code
from compress.checkpoint.scan import SourceScan, same_bytes, scan_source
from compress.context import Context
from compress.contract.block_training import BlockTrainPass
from compress.contract.pass_base import ExternalInputs
from compress.contract.step_plan import Plan, StepPlan
from compress.contract.train_pass import TrainPass
from compress.device import device_of
from compress.errors import InputError, Problem
from compress.executors.allocate import allocate
from compress.executors.dense_parent import open_dense_parent
from compress.executors.teacher import Teacher, open_teacher
from compress.freed_memory import trim_memory
from compress.layerwise.memory_estimate import computing
from compress.pipeline.build_manifest import stages_of
from compress.pipeline.entry import enter
from compress.pipeline.fail_on import Gate, hold, hold_plan
from compress.pipeline.memory_check import check_memory
from compress.pipeline.output_paths import based, check_disk, empty, locked, placed, stem, steps_folder
from compress.pipeline.plan import SHARD_BYTES, PlanOptions, make_plan
from compress.pipeline.resume import check_bytes, kept
from compress.pipeline.reuse import ReusedStep, searched, solved, take_steps
from compress.pipeline.step import RunState, StepInputs, run_step
from compress.pipeline.step_identity import step_id
from compress.spec.recipe import Recipe
from compress.spec.weight_state import State
from compress.threads import compute_threads

if TYPE_CHECKING:
    from compress.corpus import Corpus


@dataclass(frozen=True)
class Options:
    """Options of a run besides its recipe."""

    allow_skips: Sequence[str] = ()
    allow_nonfinite: bool = False
    allow_dtype_mismatch: bool = False
    shard_bytes: int = SHARD_BYTES
    fail_on: Sequence[str] = ()
    """Gates, such as `fallbacks>1%`."""
    allow_overcommit: bool = False
    steps: Sequence[Path] = ()
    """Outputs of other runs, or their steps folders, whose finished steps are taken."""
    keep: bool = True
    """Whether the steps are kept after a run that succeeded."""
    describe: Callable[[Result], None] = lambda result: None
    """Writes what is said of the output, such as its card, while all steps are there."""


@dataclass(frozen=True)
class Result:
    """The result of a run. `fresh` is False if the output existed already."""

    out: Path
    plan: Plan
    manifest: Manifest
    fresh: bool
    seconds: float
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Seconds of each step that was run, by its name, and for sweeps of each kind of work."""
    taken: tuple[ReusedStep, ...] = ()
    """The steps that existed already, here or in another run's directories."""


class OtherResultError(InputError):
    """OUT is the result of another recipe; it and its steps folder hold `solved` of the `steps` that are wanted."""

    def __init__(self, out: Path, got: str, solved: int, steps: int, format_: str) -> None:
        self.out, self.solved, self.steps, self.format = out, solved, steps, format_
        there = f": with --steps {out} it takes {solved} of {steps} steps from there" if solved else ""
        super().__init__(str(out), "what this recipe makes of this source", got, f"choose another OUT{there}; or remove it")


def refuse_nonfinite(plan: Plan, scan: SourceScan) -> None:
    """Raises InputError for NaN or Inf in a weight that is transformed: it would spoil all weights that share its scale."""
    touched = {name for step in plan.steps if step.format is None for name in step.transformed}
    if spoiled := sorted(touched & set(scan.nonfinite)):
        raise InputError(
            [Problem(f"'{name}'", "finite numbers in a weight that is to be transformed", "NaN or Inf", "put it under skip")
             for name in spoiled[:20]]
        )  # fmt: skip


def run_recipe(recipe: Recipe, source: Checkpoint, out: Path, ctx: Context, options: Options | None = None) -> Result:
    """Runs `recipe` over `source` into `out`. Raises CompressError; then nothing is published."""
    return _RecipeRun(recipe, source, out, ctx, options or Options()).run()


class _RecipeRun:
    """One run: plans, reads the source, finds finished steps, makes the others."""

    def __init__(self, recipe: Recipe, source: Checkpoint, out: Path, ctx: Context, options: Options) -> None:
        self.started = time.perf_counter()
        self.gates, self.given = [Gate.parse(text) for text in options.fail_on], searched(options.steps)
        self.recipe, self.source, self.options = recipe, source, options
        self.ctx, self.out = _settled(ctx, source), placed(out, source)
        self.decided: dict[int, dict[str, State]] = {}
        """The states that allocators have decided so far, by number of the step."""
        self.measured: dict[str, dict[str, Any]] = {}

    def run(self) -> Result:
        """Makes the output, unless it exists already."""
        ctx = self.ctx
        ctx.tell("start", recipe=self.recipe.one_liner(), source=self.source.name, out=str(self.out))
        tell_code(self.source, ctx)
        self.make_plan()
        with locked(self.out, ctx), compute_threads(ctx.threads):
            self.read_source()
            existing = ctx.broadcast(self.existing() if ctx.is_main else None)
            if existing is not None:
                return self.nothing_to_do(existing)
            self.taken = ctx.broadcast(self.take_steps() if ctx.is_main else None)
            if ctx.is_main:
                check_disk(self.plan, self.out)
            ctx.tell("plan", steps=[step.name for step in self.plan.steps], bytes=self.plan.steps[-1].payload_bytes)
            state = self.all_steps()
            assert state.manifest is not None
            seconds = time.perf_counter() - self.started
            result = Result(self.out, self.plan, state.manifest, True, seconds, self.measured, tuple(self.taken))
            self.end(result)
        return result

    def make_plan(self) -> None:
        """Plans all steps, and checks gates and memory against the plan."""
        self.model, self.dense_view = enter(self.recipe, self.source, self.options.allow_dtype_mismatch)
        # config.json may tie tensors that the checkpoint stores twice; only equal ones are written once.
        copies = self.model.duplicates.items()
        self.dropped = frozenset(alias for alias, kept in copies if same_bytes(self.source, alias, kept))
        self.plan = self.planned()
        for step in self.plan.steps:
            hold_plan(self.gates, step, step.weights)
        if not self.options.allow_overcommit:
            check_memory(self.plan, device_of(self.ctx))

    def planned(self) -> Plan:
        """The plan with the states that have been decided so far."""
        chosen = PlanOptions(self.ctx.threads, self.options.allow_skips, self.options.shard_bytes, self.ctx.dtype)
        made = make_plan(self.recipe, self.source, self.model, chosen, self.dropped, self.dense_view, self.decided)
        last = made.steps[-1]
        return replace(made, steps=[*made.steps[:-1], replace(last, texts=based(last.texts, self.out))])

    def read_source(self) -> None:
        """Reads every byte of the source, draws all tokens, and opens the other models that steps read."""
        ctx, plan = self.ctx, self.plan
        self.scan: SourceScan = ctx.broadcast(
            scan_source(self.source, ctx, self.options.allow_nonfinite) if ctx.is_main else None
        )
        refuse_nonfinite(plan, self.scan)
        self.corpora = _draw_tokens(plan, self.source, ctx) if ctx.is_main else {}
        digests = ctx.broadcast({number: corpus.digest for number, corpus in self.corpora.items()})
        self.read = _tokens_read(plan, digests)
        found = ((step.number, _second_model(step, plan, self.source, self.scan, ctx)) for step in plan.steps)
        self.second_models = {number: model for number, model in found if model is not None}

    def inputs_of(self, step: StepPlan, dtype: str = "") -> dict[str, str]:
        """Identities of what a step reads besides its parent; `dtype` replaces this run's, to compare with an earlier run."""
        model, own = self.second_models.get(step.number), str(computing(self.ctx.dtype, self.source.config))
        found = ExternalInputs(self.read[step.number], dtype or own, model.fingerprint if model else "")
        # A model's own code may change what it computes.
        code = {"code": hash_json(self.scan.code)} if self.scan.code else {}
        return code | step.pass_.external_inputs(found)

    def id_of(self, step: StepPlan, parent: str) -> str:
        """The id of a step; `parent` is the fingerprint of the checkpoint that it reads."""
        return step_id(parent, step.pass_, self.ctx.seed, self.inputs_of(step))

    def existing(self) -> Manifest | None:
        """OUT's manifest if OUT is what this run would make, byte for byte. Raises InputError if it is something else."""
        out, plan = self.out, self.plan
        if not out.exists():
            return None
        do = "choose another OUT, or remove it"
        manifest = Manifest.read(out) if out.is_dir() else None
        if manifest is None:
            got = "a directory that compress did not make" if out.is_dir() else "a file"
            raise InputError(str(out), "no such directory yet, or one that this recipe made", got, do)
        made_here = list(manifest.lineage)[-len(plan.passes) :]
        same = len(made_here) == len(plan.passes) and made_here[0].parent == self.scan.fingerprint
        for line, step in zip(made_here, plan.steps, strict=False):
            inputs = self.inputs_of(step, line.inputs.get("dtype", ""))
            same = same and line.id == step_id(line.parent, step.pass_, self.ctx.seed, inputs)
        if same:
            check_bytes(out, self.ctx)
            return manifest
        text = " | ".join(step.text for step in manifest.lineage)
        there = len(list(solved(plan, [steps_folder(out), out], self.id_of, self.scan.fingerprint)))
        fmt = plan.steps[-1].format
        raise OtherResultError(out, f"another result: {text}", there, len(plan.steps), fmt.name if fmt is not None else "")

    def nothing_to_do(self, existing: Manifest) -> Result:
        """The result of a run whose output exists already."""
        hold(self.gates, existing)
        self.decided = {step.number: states for step in self.plan.steps if (states := _decided(step, existing))}
        self.plan = self.planned()
        result = Result(self.out, self.plan, existing, False, time.perf_counter() - self.started)
        self.end(result)
        return result

    def take_steps(self) -> list[ReusedStep]:
        """Takes steps that other runs have finished to where this run looks for them."""
        return take_steps(self.plan, self.out, self.given, self.id_of, self.scan.fingerprint, self.ctx)

    def all_steps(self) -> RunState:
        """Makes every step that is missing; returns the state after the last one."""
        source, scan, manifest = self.source, self.scan, self.source.manifest
        state = RunState(source, scan.digests, scan.fingerprint, manifest.lineage if manifest else (), manifest)
        state.tokens = source.path / CALIBRATION if CALIBRATION in source.side_files else None
        state.stages = stages_of(manifest)
        for number in range(len(self.plan.steps)):
            self.one_step(number, state)
            hold(self.gates, state.manifest)
        for checkpoint in (*state.past, state.source):
            checkpoint.close()
        return state

    def one_step(self, number: int, state: RunState) -> None:
        """Finds or makes one step, and updates `state` to its output."""
        ctx, step = self.ctx, self.plan.steps[number]
        identity = self.id_of(step, state.fingerprint)
        own = steps_folder(self.out) / stem(step.number, step.name, identity)
        place = self.out if step is self.plan.steps[-1] else own
        there = any(step.number == one.number for one in self.taken)
        done = there or ctx.broadcast(kept(place, step, ctx) if ctx.is_main else None)
        if done and not there:
            self.taken.append(ReusedStep(step.number, step.name, place))
        state.past.append(state.source)
        if step.pass_.allocator() is not None:
            # The decision fixes the layout of this step, and the states from which later steps start.
            table = own.with_name(f"{own.name}.{ALLOCATION[0]}")
            known = _decided(step, Manifest.read(place)) if done else {}
            found = known or allocate(step, step.weights, state.source, state.tokens, table, ctx)
            self.decided[step.number] = found
            self.plan = self.planned()
            step = self.plan.steps[number]
        if not done:
            redacted = step.pass_.redacted()
            line = Step(
                id=identity, parent=state.fingerprint, text=str(redacted.line()), revision=redacted.revision,
                options=redacted.model_dump(mode="json"), inputs=self.inputs_of(step),
            )  # fmt: skip
            inputs = StepInputs(
                self.plan, self.scan, self.corpora.get(step.number), self.second_models.get(step.number), self.gates
            )
            made = run_step(step, state, line, place, inputs, ctx)
            # What a step leaves is not to lie below the next one's peak. A model that was trained is held by cycles.
            if step.pass_.worker().executor() == "train" and step is not self.plan.steps[-1]:
                gc.collect()
            trim_memory()
            self.measured[step.name] = made
            ctx.tell("step", name=step.name, where=str(place), **made)
        ctx.barrier()
        _go_on(state, step, place, self.source, identity)

    def end(self, result: Result) -> None:
        """Describes the output of a run that succeeded, and removes the steps unless they are to be kept."""
        self.ctx.barrier()
        if not self.ctx.is_main:
            return
        self.options.describe(result)
        if not self.options.keep:
            empty(steps_folder(self.out))


def _settled(ctx: Context, source: Checkpoint) -> Context:
    """The context with `auto` replaced by the actual device and dtype. Raises UsageError, MachineError."""
    device = device_of(ctx)
    dtype = computing(ctx.dtype, source.config, device)
    return replace(ctx, device=str(device), dtype=str(dtype).removeprefix("torch."))


def _decided(step: StepPlan, manifest: Manifest | None) -> dict[str, State]:
    """The states that a finished step's allocator has decided, from the manifest of that step or of a later one."""
    if step.pass_.allocator() is None or manifest is None:
        return {}
    return {name: State.parse(manifest.weights[name].state) for name in step.transformed}


def _tokens_read(plan: Plan, corpora: dict[int, str]) -> dict[int, str]:
    """Digest of the tokens that each step reads, by its number: its own in `corpora`, or the calibration tokens."""
    calibration, found = corpora.get(0, ""), {}
    for step in plan.steps:
        found[step.number] = corpora.get(step.number, calibration)
        if step.pass_.makes_tokens:
            calibration = found[step.number]
    return found


def _draw_tokens(plan: Plan, source: Checkpoint, ctx: Context) -> dict[int, Corpus]:
    """Tokens by the number of the step that draws them; under 0 those stored with the source, if a step reads them."""
    from compress.corpus import Corpus

    found: dict[int, Corpus] = {}
    first = next((s.pass_ for s in plan.steps if s.pass_.makes_tokens or s.pass_.reads_tokens()), None)
    if first is not None and not first.makes_tokens:
        found[0] = Corpus.load(source.path / CALIBRATION)
    for step in plan.steps:
        for note in step.pass_.source_notes():
            ctx.tell("notice", step=step.name, text=f"{note.what}: {note.reason}")
        if (corpus := step.pass_.own_tokens(source, ctx.seed)) is not None:
            found[step.number] = corpus
    return found


def _second_model(step: StepPlan, plan: Plan, source: Checkpoint, scan: SourceScan, ctx: Context) -> Teacher | None:
    """The other model that a step reads: a teacher, or the dense model of a source in codes."""
    if isinstance(step.pass_, TrainPass | BlockTrainPass):
        return open_teacher(step.pass_, source, scan, ctx)
    return open_dense_parent(step, plan, source, ctx) if step.pass_.second_model == "dense" else None


def _go_on(state: RunState, step: StepPlan, place: Path, source: Checkpoint, identity: str) -> None:
    """Updates a run's state to the output of a step. Raises InputError if another checkpoint is there."""
    manifest = Manifest.read(place)
    if manifest is None or manifest.lineage[-1].id != identity:
        raise InputError(str(place), "the checkpoint of this step", "another one", f"remove {place} and run again")
    state.lineage, state.stages = manifest.lineage, stages_of(manifest)
    if step.pass_.makes_tokens:
        state.tokens = place / CALIBRATION
    if step.inherits:
        return
    state.source = open_checkpoint(place, source.name, source.origin, source.trusted)
    state.manifest, state.digests, state.fingerprint = manifest, manifest.digests, manifest.fingerprint
