"""Step: runs one step of a plan in a .tmp, and publishes it by one rename."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architecture.sizes import resized_config
from compress.checkpoint.manifest import FILE, Manifest, Step
from compress.checkpoint.reader import ABOUT, ALLOCATION, CALIBRATION, TRAINING, Checkpoint
from compress.checkpoint.scan import SourceScan, file_digest, text_digest
from compress.checkpoint.writer import Writer
from compress.context import Context
from compress.contract.block_training import BlockTrainPass
from compress.contract.feature_pass import FeaturePass
from compress.contract.rotating_pass import same_basis
from compress.contract.step_plan import Plan, StepPlan
from compress.errors import MachineError
from compress.executors.allocate import record
from compress.executors.dense_parent import DenseParent
from compress.executors.execute import execute
from compress.executors.step_run import StepRun
from compress.executors.teacher import Teacher
from compress.layerwise.dense_view import DenseView
from compress.pipeline.build_manifest import Written, build_manifest
from compress.pipeline.fail_on import Gate, hold
from compress.pipeline.output_paths import steps_folder
from compress.pipeline.resume import kept
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    from compress.corpus import Corpus

TOKENS = ".training-tokens.safetensors"
"""The tokens of a training pass, in its .tmp while it runs."""


@dataclass
class RunState:
    """The state of a run between steps: the checkpoint that the next step reads, and its calibration tokens."""

    source: Checkpoint
    digests: dict[str, str]
    fingerprint: str
    lineage: tuple[Step, ...]
    manifest: Manifest | None
    tokens: Path | None = None
    stages: tuple[dict[str, Any], ...] = ()
    """What each step of the lineage has measured."""
    past: list[Checkpoint] = field(default_factory=list)
    """The checkpoints that the steps so far have read."""


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a step besides the state of the run."""

    plan: Plan
    scan: SourceScan
    corpus: Corpus | None
    """The tokens that the step has drawn from its own texts; on rank 0 only."""
    second_model: Teacher | None
    gates: Sequence[Gate]


def run_step(step: StepPlan, state: RunState, line: Step, place: Path, inputs: StepInputs, ctx: Context) -> dict[str, Any]:
    """Runs one step in its .tmp and publishes it at `place`. Returns its seconds, in all and of each kind of work."""
    started = time.perf_counter()
    ctx.tell("begin", step=step.name)
    plan = inputs.plan
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
    run = _step_run(step, state, inputs, writer, ctx)
    spent = execute(run)
    if step.pass_.allocator() is not None and ctx.is_main:
        record(writer.path.with_suffix(f".{ALLOCATION[0]}"), writer.path, str(step.pass_.redacted().line()))
    writer.detach()
    ctx.barrier()
    measured: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3), **({"spent": spent} if spent else {})}
    if ctx.is_main:
        _seal(run, state, line, inputs, measured)
        _publish(writer, step, plan, place)
    ctx.barrier()
    return measured


def _step_run(step: StepPlan, state: RunState, inputs: StepInputs, writer: Writer, ctx: Context) -> StepRun:
    """Collects what the executor of a step needs."""
    weights, model = () if step.inherits else step.weights, inputs.second_model
    compensates = step.pass_.second_model == "dense"
    return StepRun(
        step, state.source, weights, state.digests, writer, ctx,
        tokens=_tokens_for(step, state, inputs.corpus, writer, ctx),
        teacher=None if model is None or compensates else _teacher(step, state, inputs.plan, model.checkpoint),
        dense_parent=_dense_parent(step, state, inputs),
        dense_view=DenseView(state.source) if step.pass_.unpacks else None,
    )  # fmt: skip


def _teacher(step: StepPlan, state: RunState, plan: Plan, dense: Checkpoint) -> Checkpoint:
    """The teacher of a step. Where hidden states are compared, it is the dense model as this run has rotated it."""
    worker = step.pass_.worker()
    if not isinstance(worker, BlockTrainPass | FeaturePass):
        return dense
    turned = [earlier.number for earlier in plan.steps[: step.number - 1] if earlier.rotations is not None]
    teacher = state.past[turned[-1]] if turned and not worker.second_name() else dense
    same_basis(state.manifest, teacher.manifest)
    return teacher


def _dense_parent(step: StepPlan, state: RunState, inputs: StepInputs) -> DenseParent | None:
    """Reads the dense weights of codes, for a pass that corrects codes or chooses them anew."""
    asks = step.pass_.second_model == "dense" or step.pass_.worker().learns_codes()
    return DenseParent(step, inputs.plan, state.past, inputs.second_model) if asks else None


def _tokens_for(step: StepPlan, state: RunState, corpus: Corpus | None, writer: Writer, ctx: Context) -> Path | None:
    """The file of a step's tokens. Tokens of its own are drawn by rank 0, which writes them to a file for the others."""
    if step.pass_.makes_tokens or step.pass_.reads_tokens() or step.pass_.executor() != "train":
        return state.tokens
    if corpus is not None:
        corpus.save(writer.path / TOKENS)
    ctx.barrier()
    return writer.path / TOKENS


def _seal(run: StepRun, state: RunState, line: Step, inputs: StepInputs, measured: dict[str, Any]) -> None:
    """Checks the written weights, and adds the manifest and all side files."""
    step, writer = run.step, run.writer
    side = _side_files(run, state, inputs.corpus)
    entries = writer.read_journals()
    _verify(writer, run.weights, entries)
    if run.ctx.spread:
        writer.check(entries)
    texts = {} if step.inherits else {**step.texts, **_config_of(run)}
    files = {name: file_digest(path) for name, path in side.items()}
    files |= {name: text_digest(name, text) for name, text in texts.items()}
    # A killed run may have left partial copies, so files that are copied are not digested here.
    copied = {name: path for name, path in side.items() if path.parent != writer.path}
    made_here = [writer.path / name for name in (CALIBRATION, *TRAINING, *ALLOCATION) if name not in copied]
    files |= {path.name: file_digest(path) for path in made_here if path.is_file()}
    written = Written((*state.lineage, line), entries, files, measured, state.stages, inputs.plan)
    manifest = build_manifest(run, state.manifest, inputs.scan, inputs.second_model, written)
    hold(inputs.gates, manifest)
    run.ctx.tell("publish", step=step.name)
    writer.seal({**texts, FILE: manifest.to_text()}, copied)


def _config_of(run: StepRun) -> dict[str, str]:
    """config.json of a smaller model, now that the layers that it has kept are known."""
    cut, kept = run.step.cut, run.kept
    if cut is None or kept is None:
        return {}
    config = resized_config(cut.config, cut.before, cut.after, kept.layers)
    return {"config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def _side_files(run: StepRun, state: RunState, corpus: Corpus | None) -> dict[str, Path]:
    """Side files that the step copies, by their names in its output."""
    step, source = run.step, run.source
    side = {name: source.path / name for name in source.side_files if name not in (CALIBRATION, *ABOUT)}
    if state.tokens is not None and step.format is None:
        side[CALIBRATION] = state.tokens
    if corpus is not None and step.pass_.makes_tokens:
        corpus.save(run.writer.path / CALIBRATION)
        side[CALIBRATION] = run.writer.path / CALIBRATION
    return {} if step.inherits else {name: path for name, path in side.items() if name not in step.texts}


def _publish(writer: Writer, step: StepPlan, plan: Plan, place: Path) -> None:
    """Publishes a sealed step, and removes the table that its decision was kept in."""
    writer.publish(place, read_only=step is not plan.steps[-1])
    writer.path.with_suffix(f".{ALLOCATION[0]}").unlink(missing_ok=True)


def _only_to_rename(writer: Writer, step: StepPlan, line: Step, ctx: Context) -> bool:
    """Whether a killed run has finished all of a step, byte for byte, but its last rename."""
    if not writer.sealed:
        return False
    manifest = Manifest.read(writer.path)
    return manifest is not None and manifest.lineage[-1].id == line.id and kept(writer.path, step, ctx)


def _verify(writer: Writer, weights: Sequence[Weight], entries: dict[str, dict[str, Any]]) -> None:
    """Raises if a weight is not journaled, or a shard has another size or header than planned."""
    missing = [weight.name for weight in weights if weight.name not in entries]
    assert not missing, f"not written: {missing[:3]}"
    for shard in writer.shards:
        with open(writer.path / shard.file, "rb") as stream_:
            head = stream_.read(shard.header_bytes)
            size = os.fstat(stream_.fileno()).st_size
        if head != shard.header or size != shard.nbytes:
            raise MachineError(
                str(writer.path / shard.file), f"{shard.nbytes} bytes with the planned header", f"{size} bytes",
                "something else wrote there: run again",
            )  # fmt: skip
