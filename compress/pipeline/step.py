"""Step: runs one step of a plan beside its place, and publishes it by one rename."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.manifest import FILE, Manifest, Step
from compress.checkpoint.reader import ALLOCATION, CALIBRATION, KEPT, README, TRAINING, Checkpoint, open_checkpoint
from compress.checkpoint.scan import SourceScan, file_digest, scan_source, text_digest
from compress.checkpoint.writer import Writer
from compress.context import Context
from compress.contract.allocation_pass import decides
from compress.contract.pass_base import CompensatingPass, DataPass, TrainPass, WeightPass, sweeps
from compress.contract.smoothing_pass import SmoothingPass
from compress.contract.step_plan import Plan, StepPlan
from compress.errors import InputError, MachineError
from compress.executors.allocate import record
from compress.executors.dense_parent import DenseParent
from compress.executors.stream import stream
from compress.executors.teacher import Teacher
from compress.layerwise.dense_view import DenseView
from compress.pipeline.build_manifest import account
from compress.pipeline.fail_on import Gate, hold
from compress.pipeline.model_card import card, carried, licence_of
from compress.pipeline.output_paths import steps_folder
from compress.pipeline.resolve import reads_tokens, worker_of
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    from compress.corpus import Corpus

TOKENS = ".training-tokens.safetensors"
"""What a training pass reads, while it does."""


def check_bytes(place: Path, ctx: Context) -> None:
    """Reads a checkpoint of ours. Raises InputError where a byte is not what its manifest says."""
    checkpoint = open_checkpoint(place)
    try:
        scan_source(checkpoint, replace(ctx, events=lambda event: None), allow_nonfinite=True)
    finally:
        checkpoint.close()


def check_tokens(place: Path) -> None:
    """Reads the calibration tokens of a step. Raises InputError where a byte is not what its manifest says."""
    manifest, file = Manifest.read(place), place / CALIBRATION
    if manifest is None or not file.is_file() or file_digest(file) != manifest.files[CALIBRATION]:
        raise InputError(str(file), "the bytes that manifest.json names", "other bytes, or none", "make it anew")


def kept(place: Path, step: StepPlan, ctx: Context) -> bool:
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


@dataclass
class RunState:
    """How far a run has come: the checkpoint that the next step reads, and its calibration tokens."""

    source: Checkpoint
    digests: dict[str, str]
    fingerprint: str
    lineage: tuple[Step, ...]
    manifest: Manifest | None
    tokens: Path | None = None
    past: list[Checkpoint] = field(default_factory=list)
    """What each step so far has read."""


def run_step(
    step: StepPlan, plan: Plan, now: RunState, line: Step, place: Path, scan: SourceScan, corpus: Corpus | None,
    teacher: Teacher | None, gates: Sequence[Gate], ctx: Context,
) -> dict[str, Any]:  # fmt: skip
    """Runs one step into its .tmp and publishes it at `place`. Returns seconds, also by what they were spent on."""
    started = time.perf_counter()
    ctx.tell("begin", step=step.name)
    folder = steps_folder(place) if step is plan.steps[-1] else place.parent
    writer = Writer(folder / f"{step.number}-{step.name}-{line.id[:8]}.tmp", step.shards, ctx.rank)
    if ctx.broadcast(_only_to_rename(writer, step, line, ctx) if ctx.is_main else None):
        if ctx.is_main:
            _publish(writer, step, plan, place)
        ctx.barrier()
        return {"seconds": round(time.perf_counter() - started, 3)}
    if ctx.is_main:
        writer.open(line.id)
    ctx.barrier()
    writer.attach()
    spent: dict[str, float] = {}
    weights = [] if step.inherits else plan.weights
    worker = worker_of(step.pass_)
    assert isinstance(worker, WeightPass | DataPass)
    doing = replace(step, pass_=worker)
    dense_parent = DenseParent(step, plan, now.past, teacher) if isinstance(step.pass_, CompensatingPass) else None
    if sweeps(doing.pass_):
        from compress.corpus import Corpus
        from compress.executors.smooth import SmoothingSweep
        from compress.executors.sweep import sweep

        assert now.tokens is not None
        tokens, driver = Corpus.load(now.tokens).tensors, SmoothingSweep if isinstance(doing.pass_, SmoothingPass) else None
        spent = sweep(doing, now.source, weights, now.digests, tokens, writer, ctx, driver, dense_parent)
    elif isinstance(step.pass_, TrainPass):
        spent = _train(step, now, weights, corpus, teacher, writer, ctx)
    else:
        stream(doing, now.source, weights, now.digests, writer, ctx, _meaning(step, now.source), dense_parent)
    if decides(step.pass_) and ctx.is_main:
        record(writer.path.with_suffix(f".{ALLOCATION[0]}"), writer.path, str(step.pass_.redacted().line()))
    writer.detach()
    ctx.barrier()
    measured: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3), **({"spent": spent} if spent else {})}
    if ctx.is_main:
        side = carried({name: now.source.path / name for name in now.source.side_files if name != CALIBRATION})
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
        files |= {name: text_digest(name, text) for name, text in texts.items()}
        # Of what is copied a run that was killed may have left a part there.
        copied = {name: path for name, path in side.items() if path.parent != writer.path}
        made_here = [writer.path / name for name in (CALIBRATION, *TRAINING, *ALLOCATION) if name not in copied]
        files |= {path.name: file_digest(path) for path in made_here if path.is_file()}
        taught_by = None if teacher is None else teacher.checkpoint
        manifest = account(
            step, weights, now.source, now.manifest, (*now.lineage, line), scan, taught_by, entries, files, measured, ctx
        )
        hold(gates, manifest)
        if not step.inherits:
            texts = {**texts, README: _card(manifest, step, plan, side)}
        ctx.tell("publish", step=step.name)
        writer.seal({**texts, FILE: manifest.to_text()}, copied)
        _publish(writer, step, plan, place)
    ctx.barrier()
    return measured


def _card(manifest: Manifest, step: StepPlan, plan: Plan, side: dict[str, Path]) -> str:
    """The README.md that tells of a step. The manifest holds no digest of it: whoever has the artifact may write on."""
    config, verdicts = json.loads(step.texts["config.json"]), plan.verdicts if step.format else ()
    return card(manifest, step.payload_bytes, config, verdicts, licence_of(side.get(KEPT[README])))


def _publish(writer: Writer, step: StepPlan, plan: Plan, place: Path) -> None:
    """Puts a step that is whole in its place, and takes away what its decision was kept in."""
    writer.publish(place, read_only=step is not plan.steps[-1])
    writer.path.with_suffix(f".{ALLOCATION[0]}").unlink(missing_ok=True)


def _only_to_rename(writer: Writer, step: StepPlan, line: Step, ctx: Context) -> bool:
    """Whether a run that was killed has made all of a step, byte for byte, but for its last rename."""
    if not writer.sealed:
        return False
    manifest = Manifest.read(writer.path)
    return manifest is not None and manifest.lineage[-1].id == line.id and kept(writer.path, step, ctx)


def _meaning(step: StepPlan, source: Checkpoint) -> DenseView | None:
    """What a packed source means to the pass that unpacks it."""
    return DenseView(source) if isinstance(step.pass_, WeightPass) and step.pass_.unpacks else None


def _train(
    step: StepPlan, now: RunState, weights: list[Weight], corpus: Corpus | None, teacher: Teacher | None, writer: Writer,
    ctx: Context,
) -> dict[str, float]:  # fmt: skip
    """Runs a training pass; only rank 0 has drawn its tokens, which the others read from where it leaves them."""
    from compress.corpus import Corpus
    from compress.executors.train import train

    tokens = now.tokens if reads_tokens(step.pass_) else writer.path / TOKENS
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
