"""Run: checks, skips what is done, runs, verifies, publishes by one rename.

A step's id is hash(parent's content, pass with all options and its revision, seed, what else it reads). Running the same
recipe again finds the same ids: a finished step is skipped, an interrupted one goes on at the tensor it was at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.manifest import Manifest, Step, hash_json
from compress.checkpoint.reader import ALLOCATION, CALIBRATION, Checkpoint, open_checkpoint
from compress.checkpoint.remote_code import tell_code
from compress.checkpoint.scan import SourceScan, same_bytes, scan_source
from compress.context import Context
from compress.contract.allocation_pass import decides
from compress.contract.pass_base import CompensatingPass, DataPass, Pass, TrainPass, sweeps
from compress.contract.step_plan import Plan, StepPlan
from compress.device import device_of
from compress.errors import InputError, Problem
from compress.executors.allocate import decide
from compress.executors.dense_parent import open_dense_parent
from compress.executors.teacher import Teacher, open_teacher
from compress.layerwise.memory_estimate import computing
from compress.pipeline.entry import enter
from compress.pipeline.fail_on import Gate, hold, hold_plan
from compress.pipeline.memory_check import check_memory
from compress.pipeline.output_paths import based, check_disk, empty, locked, placed, stem, steps_folder
from compress.pipeline.plan import SHARD_BYTES, make_plan
from compress.pipeline.resolve import reads_tokens, worker_of
from compress.pipeline.reuse import IdOf, ReusedStep, searched, solved, take_steps
from compress.pipeline.step import RunState, check_bytes, kept, run_step
from compress.spec.recipe import Recipe
from compress.spec.weight_state import State
from compress.threads import compute_threads

if TYPE_CHECKING:
    from compress.corpus import Corpus


@dataclass(frozen=True)
class Options:
    """What a run may be told besides its recipe."""

    allow_skips: Sequence[str] = ()
    allow_nonfinite: bool = False
    allow_dtype_mismatch: bool = False
    shard_bytes: int = SHARD_BYTES
    fail_on: Sequence[str] = ()
    """Gates, such as `fallbacks>1%`."""
    allow_overcommit: bool = False
    steps: Sequence[Path] = ()
    """Outputs of other runs, or their steps folders, whose solved steps are taken."""
    keep: bool = True
    """Whether the steps stay when the run has ended well."""


@dataclass(frozen=True)
class Result:
    """What a run did. `fresh` is False where the output was there already."""

    out: Path
    plan: Plan
    manifest: Manifest
    fresh: bool
    seconds: float
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Seconds of each step that was run, by its name, and for sweeps what they were spent on."""
    taken: tuple[ReusedStep, ...] = ()
    """The steps that were there already, here or where another run had them."""


class OtherResultError(InputError):
    """OUT is another result; it or its steps folder has `solved` of the `steps` that are wanted."""

    def __init__(self, out: Path, got: str, solved: int, steps: int, format_: str) -> None:
        self.out, self.solved, self.steps, self.format = out, solved, steps, format_
        there = f": with --steps {out} it takes {solved} of {steps} steps from there" if solved else ""
        super().__init__(str(out), "what this recipe makes of this source", got, f"choose another OUT{there}; or remove it")


def refuse_nonfinite(plan: Plan, scan: SourceScan) -> None:
    """NaN and Inf may be carried along, never computed with: one would spoil every weight that shares its scale."""
    touched = {name for step in plan.steps if step.format is None for name in step.transformed}
    if spoiled := sorted(touched & set(scan.nonfinite)):
        raise InputError(
            [Problem(f"'{name}'", "finite numbers in a weight that is to be transformed", "NaN or Inf", "put it under skip")
             for name in spoiled[:20]]
        )  # fmt: skip


def step_id(parent: str, pass_: Pass, seed: int, inputs: dict[str, str]) -> str:
    """The identity of one step; `parent` is the fingerprint of the checkpoint it reads, `inputs` are what else it reads."""
    return hash_json({"parent": parent, "seed": seed, "inputs": inputs, **pass_.redacted().identity()})


def inputs_of(pass_: Pass, tokens: str, dtype: str, teacher: str, code: dict[str, str]) -> dict[str, str]:
    """What a pass reads besides its parent. Texts count as the tokens that they became, a model as its fingerprint.

    `code` is the model's own that may be run: with it another class may compute than without.
    """
    found = {"code": hash_json(code)} if code else {}
    if isinstance(pass_, DataPass):
        return {**found, "tokens": tokens}
    reads = {**found, "tokens": tokens, "dtype": dtype}
    if decides(pass_) and pass_.gradients:
        return {**reads, **({"allocation": digest} if (digest := pass_.table_digest()) else {})}
    found = reads if sweeps(worker_of(pass_)) or isinstance(pass_, TrainPass) else found
    if teacher:
        found["dense" if isinstance(pass_, CompensatingPass) else "teacher"] = teacher
    return found


def _tokens_read(plan: Plan, corpora: dict[int, str]) -> dict[int, str]:
    """Digest of the tokens that each step reads, by its number: those of its own in `corpora`, or those that travel."""
    travelling, found = corpora.get(0, ""), {}
    for step in plan.steps:
        found[step.number] = corpora.get(step.number, travelling)
        if isinstance(step.pass_, DataPass):
            travelling = found[step.number]
    return found


def run_recipe(recipe: Recipe, source: Checkpoint, out: Path, ctx: Context, options: Options | None = None) -> Result:
    """Runs `recipe` over `source` into `out`. Raises CompressError; then nothing is published."""
    started = time.perf_counter()
    options = options or Options()
    gates, given = [Gate.parse(text) for text in options.fail_on], searched(options.steps)
    ctx = _settled(ctx, source)
    out = placed(out, source)
    ctx.tell("start", recipe=recipe.one_liner(), source=source.name, out=str(out))
    tell_code(source, ctx)
    model, dense_view = enter(recipe, source, options.allow_dtype_mismatch)

    # config.json may tie what a checkpoint holds twice; only what is equal is written once.
    dropped = frozenset(alias for alias, kept in model.duplicates.items() if same_bytes(source, alias, kept))

    def layout(decided: dict[int, dict[str, State]] | None = None) -> Plan:
        made = make_plan(
            recipe, source, model, ctx.threads, options.allow_skips, dropped, options.shard_bytes, ctx.dtype, dense_view, decided
        )
        last = made.steps[-1]
        return replace(made, steps=[*made.steps[:-1], replace(last, texts=based(last.texts, out))])

    plan = layout()
    for step in plan.steps:
        hold_plan(gates, step, plan.weights)
    if not options.allow_overcommit:
        check_memory(plan, device_of(ctx))
    with locked(out, ctx), compute_threads(ctx.threads):
        scan = ctx.broadcast(scan_source(source, ctx, options.allow_nonfinite) if ctx.is_main else None)
        refuse_nonfinite(plan, scan)
        corpora = _gather(plan, source, ctx) if ctx.is_main else {}
        digests = ctx.broadcast({number: corpus.digest for number, corpus in corpora.items()})
        teachers = {
            step.number: found for step in plan.steps if (found := _model_beside(step, plan, source, scan, ctx)) is not None
        }  # fmt: skip
        taught = {number: teacher.fingerprint for number, teacher in teachers.items()}
        read, dtype = _tokens_read(plan, digests), str(computing(ctx.dtype, source.config))

        def inputs_to(step: StepPlan) -> dict[str, str]:
            return inputs_of(step.pass_, read[step.number], dtype, taught.get(step.number, ""), scan.code)

        def id_of(step: StepPlan, parent: str) -> str:
            return step_id(parent, step.pass_, ctx.seed, inputs_to(step))

        existing = ctx.broadcast(_existing(out, scan, plan, digests, taught, id_of, ctx) if ctx.is_main else None)
        if existing is not None:
            hold(gates, existing)
            plan = layout({step.number: states for step in plan.steps if (states := _decided(step, existing))})
            _end(out, options, ctx)
            return Result(out, plan, existing, False, time.perf_counter() - started)
        taken = ctx.broadcast(take_steps(plan, out, given, id_of, scan.fingerprint, ctx) if ctx.is_main else None)
        if ctx.is_main:
            check_disk(plan, out)
        ctx.tell("plan", steps=[step.name for step in plan.steps], bytes=plan.steps[-1].payload_bytes)
        manifest = source.manifest
        now = RunState(source, scan.digests, scan.fingerprint, manifest.lineage if manifest else (), manifest)
        now.tokens = source.path / CALIBRATION if CALIBRATION in source.side_files else None
        measured: dict[str, dict[str, Any]] = {}
        decided: dict[int, dict[str, State]] = {}
        for number in range(len(plan.steps)):
            step = plan.steps[number]
            identity = id_of(step, now.fingerprint)
            own = steps_folder(out) / stem(step.number, step.name, identity)
            place = out if step is plan.steps[-1] else own
            there = any(step.number == one.number for one in taken)
            done = there or ctx.broadcast(kept(place, step, ctx) if ctx.is_main else None)
            if done and not there:
                taken.append(ReusedStep(step.number, step.name, place))
            now.past.append(now.source)
            if decides(step.pass_):
                # What it decides is the layout of its own bytes, and what the steps after it start from.
                table = own.with_name(f"{own.name}.{ALLOCATION[0]}")
                known = _decided(step, Manifest.read(place)) if done else {}
                decided[step.number] = known or decide(step, plan.weights, now.source, now.tokens, table, ctx)
                plan = layout(decided)
                step = plan.steps[number]
            if not done:
                line = Step(
                    id=identity, parent=now.fingerprint, text=str(step.pass_.redacted().line()), revision=step.pass_.revision,
                    options=step.pass_.redacted().model_dump(mode="json"), inputs=inputs_to(step),
                )  # fmt: skip
                corpus, teacher = corpora.get(step.number), teachers.get(step.number)
                made = run_step(step, plan, now, line, place, scan, corpus, teacher, gates, ctx)
                measured[step.name] = made
                ctx.tell("step", name=step.name, where=str(place), **made)
            ctx.barrier()
            _go_on(now, step, place, source, identity)
            hold(gates, now.manifest)
        for checkpoint in (*now.past, now.source):
            checkpoint.close()
        assert now.manifest is not None
        _end(out, options, ctx)
        return Result(out, plan, now.manifest, True, time.perf_counter() - started, measured, tuple(taken))


def _end(out: Path, options: Options, ctx: Context) -> None:
    """Removes the steps of a run that has ended well, if they are not to be kept."""
    ctx.barrier()
    if ctx.is_main and not options.keep:
        empty(steps_folder(out))


def _settled(ctx: Context, source: Checkpoint) -> Context:
    """The context with the device and the dtype that its words mean here. Raises UsageError, MachineError."""
    device = device_of(ctx)
    dtype = computing(ctx.dtype, source.config, device)
    return replace(ctx, device=str(device), dtype=str(dtype).removeprefix("torch."))


def _decided(step: StepPlan, manifest: Manifest | None) -> dict[str, State]:
    """What a deciding step that was run has decided, by the manifest of what it or a step after it has made."""
    if not decides(step.pass_) or manifest is None:
        return {}
    return {name: State.parse(manifest.weights[name].state) for name in step.transformed}


def _gather(plan: Plan, source: Checkpoint, ctx: Context) -> dict[int, Corpus]:
    """Calibration tokens by the step that makes them; under 0 those that the source brings and a step reads."""
    from compress.corpus import Corpus, build_for

    found: dict[int, Corpus] = {}
    reading = (s.pass_ for s in plan.steps if isinstance(s.pass_, DataPass) or reads_tokens(s.pass_))
    if not isinstance(next(reading, None), DataPass | None):
        found[0] = Corpus.load(source.path / CALIBRATION)
    for step in plan.steps:
        if isinstance(step.pass_, DataPass):
            for note in step.pass_.notes():
                ctx.tell("notice", step=step.name, text=f"{note.what}: {note.reason}")
            found[step.number] = step.pass_.gather(source, ctx.seed)
        elif isinstance(step.pass_, TrainPass) and (texts := step.pass_.texts()) is not None:
            found[step.number] = build_for(texts, source, ctx.seed)
    return found


def _go_on(now: RunState, step: StepPlan, place: Path, source: Checkpoint, identity: str) -> None:
    """Moves the course to what a step has made. Raises InputError where that is something else."""
    manifest = Manifest.read(place)
    if manifest is None or manifest.lineage[-1].id != identity:
        raise InputError(str(place), "the checkpoint of this step", "another one", f"remove {place} and run again")
    now.lineage = manifest.lineage
    if isinstance(step.pass_, DataPass):
        now.tokens = place / CALIBRATION
    if step.inherits:
        return
    now.source = open_checkpoint(place, source.name, source.origin, source.trusted)
    now.manifest, now.digests, now.fingerprint = manifest, manifest.digests, manifest.fingerprint


def _model_beside(step: StepPlan, plan: Plan, source: Checkpoint, scan: SourceScan, ctx: Context) -> Teacher | None:
    """The other model that a step reads: what teaches it, or the dense one below a source in codes."""
    if isinstance(step.pass_, TrainPass):
        return open_teacher(step.pass_, source, scan, ctx)
    return open_dense_parent(step, plan, source, ctx) if isinstance(step.pass_, CompensatingPass) else None


def _existing(
    out: Path, scan: SourceScan, plan: Plan, corpora: dict[int, str], teachers: dict[int, str], id_of: IdOf, ctx: Context
) -> Manifest | None:
    """OUT's manifest if OUT is what this run would make, every byte of it. Raises InputError if it is something else."""
    if not out.exists():
        return None
    do = "choose another OUT, or remove it"
    manifest = Manifest.read(out) if out.is_dir() else None
    if manifest is None:
        got = "a directory that compress did not make" if out.is_dir() else "a file"
        raise InputError(str(out), "no such directory yet, or one that this recipe made", got, do)
    made_here = list(manifest.lineage)[-len(plan.passes) :]
    same = len(made_here) == len(plan.passes) and made_here[0].parent == scan.fingerprint
    read = _tokens_read(plan, corpora)
    for line, step in zip(made_here, plan.steps, strict=False):
        dtype, taught = line.inputs.get("dtype", ""), teachers.get(step.number, "")
        inputs = inputs_of(step.pass_, read[step.number], dtype, taught, scan.code)
        same = same and line.id == step_id(line.parent, step.pass_, ctx.seed, inputs)
    if same:
        check_bytes(out, ctx)
        return manifest
    text = " | ".join(step.text for step in manifest.lineage)
    there = len(list(solved(plan, [steps_folder(out), out], id_of, scan.fingerprint)))
    fmt = plan.steps[-1].format
    raise OtherResultError(out, f"another result: {text}", there, len(plan.steps), fmt.name if fmt is not None else "")
