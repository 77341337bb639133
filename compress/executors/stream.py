"""Stream: runs a data-free pass over a checkpoint, one weight at a time.

There are three cases of weights: the bytes are copied inside the operating system's kernel (nothing changes), copied part by
part (a format that stores the same bytes under other names), or loaded, transformed and written. Weights are
distributed over ranks by size; every rank writes its own at offsets that the headers fix beforehand.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.writer import Writer
from compress.contract.fused_groups import Peaks
from compress.contract.shapes import CompensatingPass, TensorPass
from compress.executors.anomalies import watch
from compress.executors.step_run import StepRun
from compress.freed_memory import large_blocks_returned, trim_memory
from compress.layerwise.memory_estimate import MAX_WORKERS
from compress.numerics import qtensor
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import Weight
from compress.threads import workers


def stream(run: StepRun) -> None:
    """Writes every weight that is not journaled yet."""
    step, source, writer, ctx = run.step, run.source, run.writer, run.ctx
    mine = share(run.weights, ctx.rank, ctx.world_size)
    total = sum(weight.nbytes for weight in mine)
    done, lock = [0], threading.Lock()
    for file in {ref.file for ref in source.refs.values()}:
        source.descriptor(file)
    changed = run.touched
    touched = {weight.name for weight in changed}
    phase = "copy" if touched.isdisjoint(weight.name for weight in mine) else "write"
    peaks = Peaks(changed, step.after, source.read)

    def one(weight: Weight) -> None:
        started, kept = time.perf_counter(), writer.is_done(weight.name)
        if not kept:
            weight = peaks.of(weight) if step.before[weight.name] != step.after[weight.name] else weight
            writer.record(weight.name, *_move(run, weight, weight.name in touched))
        with lock:
            done[0] += weight.nbytes
            ctx.tell(
                "progress", step=step.name, phase=phase, weight=weight.name, seconds=time.perf_counter() - started,
                kept=int(kept), done_bytes=done[0], total_bytes=total,
            )  # fmt: skip

    with large_blocks_returned(), workers(min(ctx.threads, MAX_WORKERS)) as pool:
        for _ in pool.map(one, mine):
            pass


def write_each(run: StepRun, weights: Sequence[Weight], write: Callable[[Weight], None]) -> None:
    """Calls `write` for this process's share of the weights, by several workers, but for those that are journaled."""
    step, source, ctx = run.step, run.source, run.ctx
    mine = share(weights, ctx.rank, ctx.world_size)
    # Opened before threads share them.
    for file in {ref.file for ref in source.refs.values()}:
        source.descriptor(file)
    total, done = sum(weight.nbytes for weight in mine), 0

    def one(weight: Weight) -> tuple[Weight, bool]:
        there = run.writer.is_done(weight.name)
        if not there:
            write(weight)
        return weight, there

    with workers(min(ctx.threads, MAX_WORKERS)) as pool:
        for weight, there in pool.map(one, mine):
            done += weight.nbytes
            ctx.tell(
                "progress", step=step.name, phase="write", weight=weight.name, kept=int(there), done_bytes=done, total_bytes=total
            )
    trim_memory()


def share(weights: Sequence[Weight], rank: int, world_size: int) -> Sequence[Weight]:
    """This rank's weights, in stored order; each weight, largest first, goes to the rank with the fewest bytes so far."""
    if world_size == 1:
        return weights
    loads = [0] * world_size
    owner: dict[str, int] = {}
    for weight in sorted(weights, key=lambda w: (-w.nbytes, w.name)):
        lightest = loads.index(min(loads))
        owner[weight.name] = lightest
        loads[lightest] += weight.nbytes
    return [weight for weight in weights if owner[weight.name] == rank]


def _move(run: StepRun, weight: Weight, touched: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Writes one weight; returns the digests of its tensors, and other facts for the journal."""
    step, source, writer = run.step, run.source, run.writer
    before, after = step.before[weight.name], step.after[weight.name]
    names = [spec.name for spec in qtensor.specs(weight, before)]
    if not touched:
        for name in names:
            _carry(source, writer, name, name)
        return {name: run.digests[name] for name in names}, {}
    written: dict[str, str] = {}
    wanted = [spec.name for spec in step.specs(weight)]
    if step.format and before == after:
        for there, here in step.format.copies(weight, after).items():
            _carry(source, writer, there, here)
            written[there] = run.digests[here]
        for there, tensor in step.format.constants(weight, after).items():
            written[there] = writer.put(there, tensor)
        if written.keys() == set(wanted):
            return written, {}
    value = _value(run, weight)
    result, facts = _transformed(run, weight, value)
    error = facts.get("error")
    if step.format is None and (odd := watch(weight, result, error, lambda: value)):
        facts["notes"] = odd
    # What it was made from is not kept while it is packed.
    value = None
    if after.sparsity is not None:
        check_mask(weight, after.sparsity, result)
    packs = step.format is not None and not step.format.plain(weight, after)
    parts = step.format.encode_as(weight, after, result) if packs and step.format else qtensor.stored(weight, result)
    del result
    for name in wanted:
        if name not in written:
            written[name] = writer.put(name, parts[name])
    return written, facts


def _value(run: StepRun, weight: Weight) -> Any:
    """A weight in the form that its pass gets: a QTensor, or dense [experts?, rows, columns]."""
    before = run.step.before[weight.name]
    if run.dense_view is not None:
        q = run.dense_view.qtensor(weight.name)
        return qtensor.as_matrix(weight, run.dense_view.dense(weight.name)) if q is None else q
    stored = {spec.name: run.source.read(spec.name) for spec in qtensor.specs(weight, before)}
    return qtensor.as_matrix(weight, stored[weight.name]) if before.scheme is None else qtensor.decode(weight, before, stored)


def _transformed(run: StepRun, weight: Weight, value: Any) -> tuple[Any, dict[str, Any]]:
    """The pass's result for a weight, and its errors if there are any."""
    pass_, after = run.pass_, run.step.after[weight.name]
    if isinstance(pass_, CompensatingPass):
        assert run.dense_parent is not None
        made, lost = pass_.compensate(weight, value, after, run.dense_parent.read(weight))
        return made, {"output_error": None, "error": lost}
    assert isinstance(pass_, TensorPass)
    result, error = pass_.tensor(weight, after, value)
    return result, {} if error is None else {"error": error}


def check_mask(weight: Weight, sparsity: Sparsity, value: Any) -> None:
    """Raises AssertionError unless `value` has the pattern of zeros that the pass had to keep or make."""
    from compress.numerics import masks

    nonzero = value.nonzero() if isinstance(value, qtensor.QTensor) else value != 0
    if not masks.holds(qtensor.along_inputs(weight, nonzero), sparsity):
        raise AssertionError(f"{weight.name} is not masked({sparsity}) after this pass")


def _carry(source: Checkpoint, writer: Writer, there: str, here: str) -> None:
    ref = source.refs[here]
    writer.copy(there, source.descriptor(ref.file), ref.offset)
