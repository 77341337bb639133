"""Pipeline: check, skip what is done, run, verify, publish by one rename.

A step's id is hash(parent's content, pass with all options and its revision, seed, what else it reads). Running the same
recipe again finds the same ids: a finished step is skipped, an interrupted one goes on at the tensor it was at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.account import account
from compress.checkpoint import CALIBRATION, TRAINING, Checkpoint, open_checkpoint
from compress.contract import Context, DataPass, LinearPass, Pass, TrainPass, WeightPass
from compress.entry import enter
from compress.errors import InputError, MachineError, Problem
from compress.facts import Weight
from compress.footprint import computing
from compress.gate import Gate, hold, hold_plan
from compress.intake import Intake, file_digest, same_bytes, take_in
from compress.manifest import FILE, Manifest, Step, hash_json
from compress.meaning import Meaning
from compress.memory import check_memory
from compress.places import check_disk, locked, placed, steps_folder
from compress.plan import SHARD_BYTES, Plan, StepPlan, make_plan
from compress.recipe import Recipe
from compress.stream import stream
from compress.teacher import Teacher, open_teacher
from compress.trust import tell_code
from compress.writer import Writer

if TYPE_CHECKING:
    from compress.corpus import Corpus

TOKENS = ".training-tokens.safetensors"
"""What a training pass reads, while it does."""


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


def refuse_nonfinite(plan: Plan, intake: Intake) -> None:
    """NaN and Inf may be carried along, never computed with: one would spoil every weight that shares its scale."""
    touched = {name for step in plan.steps if step.format is None for name in step.transformed}
    if spoiled := sorted(touched & set(intake.nonfinite)):
        raise InputError(
            [Problem(f"'{name}'", "finite numbers in a weight that is to be transformed", "NaN or Inf", "put it under skip")
             for name in spoiled[:20]]
        )  # fmt: skip


def check_bytes(place: Path, ctx: Context) -> None:
    """Reads a checkpoint of ours. Raises InputError where a byte is not what its manifest says."""
    checkpoint = open_checkpoint(place)
    try:
        take_in(checkpoint, replace(ctx, events=lambda event: None), allow_nonfinite=True)
    finally:
        checkpoint.close()


def check_tokens(place: Path) -> None:
    """Reads the calibration tokens of a step. Raises InputError where a byte is not what its manifest says."""
    manifest, file = Manifest.read(place), place / CALIBRATION
    if manifest is None or not file.is_file() or file_digest(file) != manifest.files[CALIBRATION]:
        raise InputError(str(file), "the bytes that manifest.json names", "other bytes, or none", "make it anew")


def _kept(place: Path, step: StepPlan, ctx: Context) -> bool:
    """Whether a step is there and every byte is what its manifest says; a damaged one is removed, to be made again."""
    if not place.is_dir():
        return False
    try:
        check_tokens(place) if step.inherits else check_bytes(place, ctx)
    except InputError as error:
        ctx.tell("damaged", where=str(place), reason=str(error))
        shutil.rmtree(place)
        return False
    return True


def step_id(parent: str, pass_: Pass, seed: int, inputs: dict[str, str]) -> str:
    """The identity of one step; `parent` is the fingerprint of the checkpoint it reads, `inputs` are what else it reads."""
    return hash_json({"parent": parent, "seed": seed, "inputs": inputs, **pass_.told().identity()})


@dataclass
class _Course:
    """How far a run has come: the checkpoint that the next step reads, and its calibration tokens."""

    source: Checkpoint
    digests: dict[str, str]
    fingerprint: str
    lineage: tuple[Step, ...]
    manifest: Manifest | None
    tokens: Path | None = None


def inputs_of(pass_: Pass, tokens: str, dtype: str, teacher: str, code: dict[str, str]) -> dict[str, str]:
    """What a pass reads besides its parent. Texts count as the tokens that they became, a teacher as its fingerprint.

    `code` is the model's own that may be run: with it another class may compute than without.
    """
    found = {"code": hash_json(code)} if code else {}
    if isinstance(pass_, DataPass):
        return {**found, "tokens": tokens}
    if isinstance(pass_, LinearPass | TrainPass):
        return {**found, "tokens": tokens, "dtype": dtype, **({"teacher": teacher} if teacher else {})}
    return found


def _tokens_read(plan: Plan, corpora: dict[int, str]) -> dict[int, str]:
    """Digest of the tokens that each step reads, by its number: those of its own in `corpora`, or those that travel."""
    travelling, found = corpora.get(0, ""), {}
    for step in plan.steps:
        found[step.number] = corpora.get(step.number, travelling)
        if isinstance(step.pass_, DataPass):
            travelling = found[step.number]
    return found


def run(recipe: Recipe, source: Checkpoint, out: Path, ctx: Context, options: Options | None = None) -> Result:
    """Runs `recipe` over `source` into `out`. Raises CompressError; then nothing is published."""
    started = time.perf_counter()
    options = options or Options()
    gates = [Gate.parse(text) for text in options.fail_on]
    out = placed(out, source)
    ctx.tell("start", recipe=recipe.one_liner(), source=source.name, out=str(out))
    tell_code(source, ctx)
    model, meaning = enter(recipe, source, options.allow_dtype_mismatch)

    # config.json may tie what a checkpoint holds twice; only what is equal is written once.
    dropped = frozenset(alias for alias, kept in model.duplicates.items() if same_bytes(source, alias, kept))
    plan = make_plan(recipe, source, model, ctx.threads, options.allow_skips, dropped, options.shard_bytes, ctx.dtype, meaning)
    for step in plan.steps:
        hold_plan(gates, step, plan.weights)
    if not options.allow_overcommit:
        check_memory(plan)
    with locked(out, ctx):
        intake = ctx.broadcast(take_in(source, ctx, options.allow_nonfinite) if ctx.is_main else None)
        refuse_nonfinite(plan, intake)
        corpora = _gather(plan, source, ctx) if ctx.is_main else {}
        digests = ctx.broadcast({number: corpus.digest for number, corpus in corpora.items()})
        teachers = {
            step.number: found for step in plan.steps if isinstance(step.pass_, TrainPass)
            if (found := open_teacher(step.pass_, source, intake, ctx)) is not None
        }  # fmt: skip
        taught = {number: teacher.fingerprint for number, teacher in teachers.items()}
        existing = ctx.broadcast(_existing(out, intake, plan, digests, taught, ctx) if ctx.is_main else None)
        if existing is not None:
            hold(gates, existing)
            return Result(out, plan, existing, False, time.perf_counter() - started)
        if ctx.is_main:
            check_disk(plan, out)
        ctx.tell("plan", steps=[step.name for step in plan.steps], bytes=plan.steps[-1].payload_bytes)
        manifest = source.manifest
        now = _Course(source, intake.digests, intake.fingerprint, manifest.lineage if manifest else (), manifest)
        now.tokens = source.path / CALIBRATION if CALIBRATION in source.side_files else None
        measured: dict[str, dict[str, Any]] = {}
        read = _tokens_read(plan, digests)
        for step in plan.steps:
            inputs = inputs_of(
                step.pass_,
                read[step.number],
                str(computing(ctx.dtype, source.config)),
                taught.get(step.number, ""),
                intake.code,
            )
            identity = step_id(now.fingerprint, step.pass_, ctx.seed, inputs)
            place = out if step is plan.steps[-1] else steps_folder(out) / f"{step.number}-{step.name}-{identity[:8]}"
            if not ctx.broadcast(_kept(place, step, ctx) if ctx.is_main else None):
                line = Step(
                    id=identity, parent=now.fingerprint, text=str(step.pass_.told().line()), revision=step.pass_.revision,
                    options=step.pass_.told().model_dump(mode="json"), inputs=inputs,
                )  # fmt: skip
                corpus, teacher = corpora.get(step.number), teachers.get(step.number)
                made = _run_step(step, plan, now, line, place, intake, corpus, teacher, gates, ctx)
                measured[step.name] = made
                ctx.tell("step", name=step.name, where=str(place), **made)
            ctx.barrier()
            _go_on(now, step, place, source, identity)
            hold(gates, now.manifest)
        now.source.close()
        assert now.manifest is not None
        return Result(out, plan, now.manifest, True, time.perf_counter() - started, measured)


def _gather(plan: Plan, source: Checkpoint, ctx: Context) -> dict[int, Corpus]:
    """Calibration tokens by the step that makes them; under 0 those that the source brings and a step reads."""
    from compress.corpus import Corpus, build_for

    found: dict[int, Corpus] = {}
    reading = (s.pass_ for s in plan.steps if isinstance(s.pass_, DataPass | LinearPass) or _borrows(s.pass_))
    if isinstance(next(reading, None), LinearPass | TrainPass):
        found[0] = Corpus.load(source.path / CALIBRATION)
    for step in plan.steps:
        if isinstance(step.pass_, DataPass):
            found[step.number] = step.pass_.gather(source, ctx.seed)
        elif isinstance(step.pass_, TrainPass) and (texts := step.pass_.texts()) is not None:
            found[step.number] = build_for(texts, source, ctx.seed)
    return found


def _borrows(pass_: Pass) -> bool:
    """Whether a training pass reads the calibration tokens."""
    return isinstance(pass_, TrainPass) and pass_.texts() is None


def _go_on(now: _Course, step: StepPlan, place: Path, source: Checkpoint, identity: str) -> None:
    """Moves the course to what a step has made. Raises InputError where that is something else."""
    manifest = Manifest.read(place)
    if manifest is None or manifest.lineage[-1].id != identity:
        raise InputError(str(place), "the checkpoint of this step", "another one", f"remove {place} and run again")
    now.lineage = manifest.lineage
    if isinstance(step.pass_, DataPass):
        now.tokens = place / CALIBRATION
    if step.inherits:
        return
    if now.source is not source:
        now.source.close()
    now.source = open_checkpoint(place, source.name, source.origin, source.trusted)
    now.manifest, now.digests, now.fingerprint = manifest, manifest.digests, manifest.fingerprint


def _run_step(
    step: StepPlan, plan: Plan, now: _Course, line: Step, place: Path, intake: Intake, corpus: Corpus | None,
    teacher: Teacher | None, gates: Sequence[Gate], ctx: Context,
) -> dict[str, Any]:  # fmt: skip
    """Runs one step into its .tmp and publishes it at `place`. Returns seconds, also by what they were spent on."""
    started = time.perf_counter()
    ctx.tell("begin", step=step.name)
    folder = steps_folder(place) if step is plan.steps[-1] else place.parent
    writer = Writer(folder / f"{step.number}-{step.name}-{line.id[:8]}.tmp", step.shards, ctx.rank)
    if ctx.broadcast(_only_to_rename(writer, step, line, ctx) if ctx.is_main else None):
        if ctx.is_main:
            writer.publish(place, read_only=step is not plan.steps[-1])
        ctx.barrier()
        return {"seconds": round(time.perf_counter() - started, 3)}
    if ctx.is_main:
        writer.open(line.id)
    ctx.barrier()
    writer.attach()
    spent: dict[str, float] = {}
    weights = [] if step.inherits else plan.weights
    if isinstance(step.pass_, LinearPass):
        from compress.corpus import Corpus
        from compress.sweep import sweep

        assert now.tokens is not None
        spent = sweep(step, now.source, weights, now.digests, Corpus.load(now.tokens).tensors, writer, ctx)
    elif isinstance(step.pass_, TrainPass):
        spent = _train(step, now, weights, corpus, teacher, writer, ctx)
    else:
        stream(step, now.source, weights, now.digests, writer, ctx, _meaning(step, now.source))
    writer.detach()
    ctx.barrier()
    measured: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3), **({"spent": spent} if spent else {})}
    if ctx.is_main:
        side = {name: now.source.path / name for name in now.source.side_files if name != CALIBRATION}
        if now.tokens is not None and step.format is None:
            side[CALIBRATION] = now.tokens
        if corpus is not None and isinstance(step.pass_, DataPass):
            corpus.save(writer.path / CALIBRATION)
            side[CALIBRATION] = writer.path / CALIBRATION
        side = {} if step.inherits else {name: path for name, path in side.items() if name not in step.texts}
        entries = writer.read_journals()
        _verify(writer, weights, entries)
        texts = {} if step.inherits else step.texts
        files = {name: file_digest(path) for name, path in side.items()}
        files |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        # Of what is carried a run that was killed may have left a part there.
        carried = {name: path for name, path in side.items() if path.parent != writer.path}
        made_here = [writer.path / name for name in (CALIBRATION, *TRAINING) if name not in carried]
        files |= {path.name: file_digest(path) for path in made_here if path.is_file()}
        taught_by = None if teacher is None else teacher.checkpoint
        manifest = account(
            step, weights, now.source, now.manifest, (*now.lineage, line), intake, taught_by, entries, files, measured, ctx
        )
        hold(gates, manifest)
        ctx.tell("publish", step=step.name)
        writer.seal({**texts, FILE: manifest.to_text()}, carried.values())
        writer.publish(place, read_only=step is not plan.steps[-1])
    ctx.barrier()
    return measured


def _only_to_rename(writer: Writer, step: StepPlan, line: Step, ctx: Context) -> bool:
    """Whether a run that was killed has made all of a step, byte for byte, but for its last rename."""
    if not writer.sealed:
        return False
    manifest = Manifest.read(writer.path)
    return manifest is not None and manifest.lineage[-1].id == line.id and _kept(writer.path, step, ctx)


def _meaning(step: StepPlan, source: Checkpoint) -> Meaning | None:
    """What a packed source means to the pass that unpacks it."""
    return Meaning(source) if isinstance(step.pass_, WeightPass) and step.pass_.unpacks else None


def _train(
    step: StepPlan, now: _Course, weights: list[Weight], corpus: Corpus | None, teacher: Teacher | None, writer: Writer,
    ctx: Context,
) -> dict[str, float]:  # fmt: skip
    """Runs a training pass; only rank 0 has drawn its tokens, which the others read from where it leaves them."""
    from compress.corpus import Corpus
    from compress.train import train

    tokens = writer.path / TOKENS if not _borrows(step.pass_) else now.tokens
    if corpus is not None:
        corpus.save(writer.path / TOKENS)
    ctx.barrier()
    assert tokens is not None
    taught_by = None if teacher is None else teacher.checkpoint
    return train(step, now.source, weights, now.digests, Corpus.load(tokens), taught_by, writer, ctx)


def _verify(writer: Writer, weights: list[Weight], entries: dict[str, dict[str, Any]]) -> None:
    """Every weight is journaled and every shard has the size and header that were planned."""
    missing = [weight.name for weight in weights if weight.name not in entries]
    assert not missing, f"not written: {missing[:3]}"
    for shard in writer.shards:
        with open(writer.path / shard.file, "rb") as stream_:
            head = stream_.read(len(shard.header))
            size = os.fstat(stream_.fileno()).st_size
        if head != shard.header or size != shard.nbytes:
            raise MachineError(
                str(writer.path / shard.file), f"{shard.nbytes} bytes with the planned header", f"{size} bytes",
                "something else wrote there: run again",
            )  # fmt: skip


def _existing(
    out: Path, intake: Intake, plan: Plan, corpora: dict[int, str], teachers: dict[int, str], ctx: Context
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
    same = len(made_here) == len(plan.passes) and made_here[0].parent == intake.fingerprint
    read = _tokens_read(plan, corpora)
    for line, step in zip(made_here, plan.steps, strict=False):
        dtype, taught = line.inputs.get("dtype", ""), teachers.get(step.number, "")
        inputs = inputs_of(step.pass_, read[step.number], dtype, taught, intake.code)
        same = same and line.id == step_id(line.parent, step.pass_, ctx.seed, inputs)
    if same:
        check_bytes(out, ctx)
        return manifest
    text = " | ".join(step.text for step in manifest.lineage)
    raise InputError(str(out), "what this recipe makes of this source", f"another result: {text}", do)
