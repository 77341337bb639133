"""Pipeline: check, skip what is done, run, verify, publish by one rename.

    OUT             the last step's checkpoint; its bytes are its own, never a link into a source or cache
    OUT.steps/      the steps before it, read-only, kept until `compress clean OUT`; and the lock

A step's id is hash(parent's content, pass with all options and its revision, seed). Running the same recipe again
finds the same ids: a finished step is skipped, an interrupted one goes on at the tensor it was at.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.contract import Context, Pass, isa
from compress.errors import InputError, MachineError, Problem
from compress.facts import DENSE, Note, Weight
from compress.intake import Intake, file_digest, same_bytes, take_in
from compress.manifest import FILE, Manifest, NoteRecord, Source, Step, WeightRecord, hash_json
from compress.names import resolve
from compress.plan import SHARD_BYTES, Plan, StepPlan, make_plan
from compress.recipe import Recipe
from compress.stream import stream
from compress.writer import Writer


@dataclass(frozen=True)
class Options:
    """What a run may be told besides its recipe."""

    allow_skips: Sequence[str] = ()
    allow_nonfinite: bool = False
    allow_dtype_mismatch: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Result:
    """What a run did. `fresh` is False where the output was there already."""

    out: Path
    plan: Plan
    manifest: Manifest
    fresh: bool
    seconds: float


def steps_folder(out: Path) -> Path:
    """Where the steps of `out` lie."""
    out = Path(os.path.abspath(out))
    return out.parent / f"{out.name}.steps"


def placed(out: Path, source: Checkpoint) -> Path:
    """`out` as an absolute path. Raises InputError for a place that no run may take."""
    out = Path(os.path.abspath(out))
    if out.is_symlink():
        raise InputError(str(out), "a directory to make", "a link", "name the place itself")
    if not out.name or source.path.resolve() in out.resolve().parents:
        raise InputError(str(out), "a directory outside MODEL", "one inside it", "choose another OUT")
    return out


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


def _kept(place: Path, ctx: Context) -> bool:
    """Whether a step is there and every byte is what its manifest says; a damaged one is removed, to be made again."""
    if not place.is_dir():
        return False
    try:
        check_bytes(place, ctx)
    except InputError as error:
        ctx.tell("damaged", where=str(place), reason=str(error))
        shutil.rmtree(place)
        return False
    return True


def step_id(parent: str, pass_: Pass, seed: int) -> str:
    """The identity of one step; `parent` is the fingerprint of the checkpoint it reads."""
    return hash_json({"parent": parent, "seed": seed, **pass_.identity()})


def run(recipe: Recipe, source: Checkpoint, out: Path, ctx: Context, options: Options | None = None) -> Result:
    """Runs `recipe` over `source` into `out`. Raises CompressError; then nothing is published."""
    started = time.perf_counter()
    options = options or Options()
    out = placed(out, source)
    ctx.tell("start", recipe=recipe.one_liner(), source=source.name, out=str(out))
    model = resolve(source, options.allow_dtype_mismatch)

    # config.json may tie what a checkpoint holds twice; only what is equal is written once.
    dropped = frozenset(alias for alias, kept in model.duplicates.items() if same_bytes(source, alias, kept))
    plan = make_plan(recipe, source, model, ctx.threads, options.allow_skips, dropped, options.shard_bytes)
    with locked(out, ctx):
        intake = ctx.broadcast(take_in(source, ctx, options.allow_nonfinite) if ctx.is_main else None)
        refuse_nonfinite(plan, intake)
        existing = ctx.broadcast(_existing(out, intake, plan.passes, ctx) if ctx.is_main else None)
        if existing is not None:
            return Result(out, plan, existing, False, time.perf_counter() - started)
        if ctx.is_main:
            check_disk(plan, out)
        ctx.tell("plan", steps=[step.name for step in plan.steps], bytes=plan.steps[-1].payload_bytes)
        current, digests, fingerprint = source, intake.digests, intake.fingerprint
        manifest = source.manifest
        for step in plan.steps:
            last = step is plan.steps[-1]
            identity = step_id(fingerprint, step.pass_, ctx.seed)
            place = out if last else steps_folder(out) / f"{step.number}-{step.name}-{identity[:8]}"
            if not ctx.broadcast(_kept(place, ctx) if ctx.is_main else None):
                made = _run_step(step, plan, current, digests, fingerprint, identity, place, intake, manifest, ctx)
                ctx.tell("step", name=step.name, where=str(place), seconds=made)
            ctx.barrier()
            if current is not source:
                current.close()
            current = open_checkpoint(place, source.name, source.origin)
            manifest = current.manifest
            if manifest is None or manifest.lineage[-1].id != identity:
                raise InputError(str(place), "the checkpoint of this step", "another one", f"remove {place} and run again")
            digests, fingerprint = manifest.digests, manifest.fingerprint
        current.close()
        assert manifest is not None
        return Result(out, plan, manifest, True, time.perf_counter() - started)


def _run_step(
    step: StepPlan, plan: Plan, source: Checkpoint, digests: dict[str, str], parent: str, identity: str, place: Path,
    intake: Intake, before: Manifest | None, ctx: Context,
) -> float:  # fmt: skip
    """Runs one step into its .tmp and publishes it at `place`. Returns seconds."""
    started = time.perf_counter()
    folder = steps_folder(place) if step is plan.steps[-1] else place.parent
    writer = Writer(folder / f"{step.number}-{step.name}-{identity[:8]}.tmp", step.shards, ctx.rank)
    if ctx.is_main:
        writer.open(identity)
    ctx.barrier()
    writer.attach()
    stream(step, source, plan.weights, digests, writer, ctx)
    writer.detach()
    ctx.barrier()
    seconds = time.perf_counter() - started
    if ctx.is_main:
        entries = writer.read_journals()
        _verify(writer, plan.weights, entries)
        manifest = _manifest(step, plan, source, parent, identity, intake, before, entries, seconds, ctx)
        side = [source.path / name for name in source.side_files]
        texts = {"config.json": step.config_text, FILE: manifest.to_text()}
        writer.publish(texts, side, place, read_only=step is not plan.steps[-1])
    ctx.barrier()
    return seconds


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


def _manifest(
    step: StepPlan, plan: Plan, source: Checkpoint, parent: str, identity: str, intake: Intake,
    before: Manifest | None, entries: dict[str, dict[str, Any]], seconds: float, ctx: Context,
) -> Manifest:  # fmt: skip
    earlier = before.weights if before else {}
    records: dict[str, WeightRecord] = {}
    for weight in plan.weights:
        state = step.after[weight.name]
        if state == DENSE:
            continue
        old = earlier.get(weight.name)
        error = entries[weight.name].get("error", old.error if old else None)
        records[weight.name] = WeightRecord(
            state=str(state), dtype=weight.dtype, shape=weight.shape, transposed=weight.transposed,
            bits=round(step.bits([weight]), 6), error=round(error, 9) if error is not None else None,
        )  # fmt: skip
    digests = {name: digest for w in plan.weights for name, digest in entries[w.name]["digests"].items()}
    files = {name: file_digest(source.path / name) for name in source.side_files}
    files["config.json"] = hashlib.sha256(step.config_text.encode()).hexdigest()
    line = Step(
        id=identity, parent=parent, text=str(step.pass_.line()), options=step.pass_.model_dump(mode="json"),
        revision=step.pass_.revision,
    )  # fmt: skip
    origin = Source(
        name=source.name, commit=source.origin.get("commit"), licence=source.origin.get("licence"),
        datasets=tuple(source.origin.get("datasets", ())), fingerprint=intake.fingerprint,
    )  # fmt: skip
    notes = list(step.notes)
    if intake.nonfinite and before is None:
        notes.append(Note("nonfinite", "NaN or Inf, allowed by --allow-nonfinite", intake.nonfinite))
    kept = [n for n in (before.notes if before else ()) if n.what in ("skipped", "ragged", "nonfinite")]
    return Manifest(
        compress_version=__version__,
        parent=parent,
        source=before.source if before else origin,
        lineage=(*(before.lineage if before else ()), line),
        seed=ctx.seed,
        threads=ctx.threads,
        isa=isa(),
        format=step.format.name if step.format else "canonical",
        coverage={"targeted": len(step.targeted), "transformed": len(step.transformed), "skipped": len(step.skipped)},
        weights=records,
        notes=(*kept, *(NoteRecord(what=n.what, reason=n.reason, count=n.count, names=n.names) for n in notes)),
        digests=digests,
        files=files,
        measured={
            "seconds": round(seconds, 3),
            "peak_resident_bytes": peak_resident_bytes(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "ranks": ctx.world_size,
        },
    ).sealed()


def peak_resident_bytes() -> int:
    """The most memory this process has had resident so far.

    Linux's `ru_maxrss` would count the process that started this one, too, if that was the larger.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _existing(out: Path, intake: Intake, passes: list[Pass], ctx: Context) -> Manifest | None:
    """OUT's manifest if OUT is what this run would make, every byte of it. Raises InputError if it is something else."""
    if not out.exists():
        return None
    do = "choose another OUT, or remove it"
    manifest = Manifest.read(out) if out.is_dir() else None
    if manifest is None:
        got = "a directory that compress did not make" if out.is_dir() else "a file"
        raise InputError(str(out), "no such directory yet, or one that this recipe made", got, do)
    made_here = list(manifest.lineage)[-len(passes) :]
    same = len(made_here) == len(passes) and made_here[0].parent == intake.fingerprint
    if same and all(s.id == step_id(s.parent, p, ctx.seed) for s, p in zip(made_here, passes, strict=True)):
        check_bytes(out, ctx)
        return manifest
    text = " | ".join(step.text for step in manifest.lineage)
    raise InputError(str(out), "what this recipe makes of this source", f"another result: {text}", do)


def check_disk(plan: Plan, out: Path) -> None:
    """Raises MachineError where the steps and the output would not fit."""
    parent = out.parent if out.parent.exists() else Path.cwd()
    kept = sum(f.stat().st_blocks * 512 for f in steps_folder(out).rglob("*") if f.is_file()) if steps_folder(out).is_dir() else 0
    free = shutil.disk_usage(parent).free + kept
    need = plan.disk_bytes + (64 << 20)
    if need > free:
        raise MachineError(
            str(parent), f"{need:,} bytes free for {len(plan.steps)} steps", f"{free:,} bytes",
            "free some space, or choose an OUT on another disk",
        )  # fmt: skip


@contextmanager
def locked(out: Path, ctx: Context) -> Iterator[None]:
    """Holds OUT for this run. Raises MachineError if another run has it."""
    if not ctx.is_main:
        yield
        return
    folder = steps_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link, and never truncated: what lies there may be somebody else's.
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        do = "choose an OUT in a place that you may write to, with no file or link named OUT.steps"
        raise MachineError(str(folder), "a place to write", error.strerror or str(error), do) from None
    with open(descriptor, "rb") as stream_:
        try:
            fcntl.flock(stream_, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended while we opened the lock has taken it away; what we hold then keeps nobody out.
            if not (folder / "lock").exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder / "lock")):
                raise BlockingIOError
        except BlockingIOError:
            raise MachineError(
                str(out),
                "an output that no other run is writing",
                "a run that holds its lock",
                "wait for it, or choose another OUT",
            ) from None
        try:
            yield
        finally:
            tidy(folder)


def tidy(folder: Path) -> None:
    """Removes a steps folder that holds nothing but the lock."""
    if {entry.name for entry in folder.iterdir()} <= {"lock"}:
        shutil.rmtree(folder, ignore_errors=True)


def clean(out: Path, ctx: Context) -> int:
    """Removes OUT's steps; returns the bytes freed."""
    folder = steps_folder(out)
    if not folder.is_dir():
        return 0
    with locked(out, ctx):
        freed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for entry in folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return freed
