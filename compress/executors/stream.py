"""Stream: lifts a TensorPass to directory in, directory out.

Every weight is one of three cases: its bytes are carried over inside the kernel (nothing changes), moved part by
part (a format that stores the same streams under other names), or loaded, transformed and written. Weights are
shared out over ranks by size; every rank writes its own at places that the headers fixed beforehand.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.writer import Writer, trim_memory
from compress.context import Context
from compress.contract.fused_groups import Peaks
from compress.contract.pass_base import CompensatingPass, TensorPass
from compress.contract.step_plan import StepPlan
from compress.executors.anomalies import watch
from compress.layerwise.dense_view import DenseView
from compress.layerwise.memory_estimate import MAX_WORKERS
from compress.numerics import qtensor
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import Weight
from compress.threads import workers

if TYPE_CHECKING:
    from compress.executors.dense_parent import DenseParent


def stream(
    step: StepPlan, source: Checkpoint, weights: list[Weight], digests: dict[str, str], writer: Writer, ctx: Context,
    dense_view: DenseView | None = None, dense_parent: DenseParent | None = None,
) -> None:  # fmt: skip
    """Writes every weight that the journal does not have yet.

    `digests` are those of `source`'s tensors; `dense_view` is what they mean where they are packed, `dense_parent` what a pass
    that compensates asks for.
    """
    mine = share(weights, ctx.rank, ctx.world_size)
    total = sum(weight.nbytes for weight in mine)
    done, lock = [0], threading.Lock()
    for file in {ref.file for ref in source.refs.values()}:
        source.descriptor(file)
    touched = set(step.transformed)
    phase = "copy" if touched.isdisjoint(weight.name for weight in mine) else "write"
    peaks = Peaks((weight for weight in weights if weight.name in touched), step.after, source.read)

    def one(weight: Weight) -> None:
        started, kept = time.perf_counter(), writer.is_done(weight.name)
        if not kept:
            weight = peaks.of(weight) if step.before[weight.name] != step.after[weight.name] else weight
            moved = _move(step, source, weight, weight.name in touched, digests, writer, dense_view, dense_parent)
            writer.record(weight.name, *moved)
        with lock:
            done[0] += weight.nbytes
            ctx.tell(
                "progress", step=step.name, phase=phase, weight=weight.name, seconds=time.perf_counter() - started,
                kept=int(kept), done_bytes=done[0], total_bytes=total,
            )  # fmt: skip

    with workers(min(ctx.threads, MAX_WORKERS)) as pool:
        for _ in pool.map(one, mine):
            pass
    trim_memory()


def share(weights: list[Weight], rank: int, world_size: int) -> list[Weight]:
    """This rank's weights, in stored order: largest first to the rank with the least so far."""
    if world_size == 1:
        return weights
    loads = [0] * world_size
    owner: dict[str, int] = {}
    for weight in sorted(weights, key=lambda w: (-w.nbytes, w.name)):
        lightest = loads.index(min(loads))
        owner[weight.name] = lightest
        loads[lightest] += weight.nbytes
    return [weight for weight in weights if owner[weight.name] == rank]


def _move(
    step: StepPlan, source: Checkpoint, weight: Weight, touched: bool, digests: dict[str, str], writer: Writer,
    dense_view: DenseView | None, dense_parent: DenseParent | None,
) -> tuple[dict[str, str], dict[str, Any]]:  # fmt: skip
    """Writes one weight; returns the digests of what was written and what the journal says of it besides."""
    before, after = step.before[weight.name], step.after[weight.name]
    names = [spec.name for spec in qtensor.specs(weight, before)]
    if not touched:
        for name in names:
            _carry(source, writer, name, name)
        return {name: digests[name] for name in names}, {}
    written: dict[str, str] = {}
    wanted = [spec.name for spec in step.specs(weight)]
    if step.format and before == after:
        for there, here in step.format.copies(weight, after).items():
            _carry(source, writer, there, here)
            written[there] = digests[here]
        for there, tensor in step.format.constants(weight, after).items():
            written[there] = writer.put(there, tensor)
        if written.keys() == set(wanted):
            return written, {}
    value: Any
    if dense_view is not None:
        q = dense_view.qtensor(weight.name)
        value = qtensor.as_matrix(weight, dense_view.dense(weight.name)) if q is None else q
    else:
        value = {name: source.read(name) for name in names}
        value = qtensor.as_matrix(weight, value[weight.name]) if before.scheme is None else qtensor.decode(weight, before, value)
    facts: dict[str, Any] = {}
    result: Any
    error: float | None
    if isinstance(step.pass_, CompensatingPass):
        assert dense_parent is not None
        result, error = step.pass_.compensate(weight, value, after, dense_parent.read(weight))
        facts["output_error"] = None
    else:
        assert isinstance(step.pass_, TensorPass)
        result, error = step.pass_.tensor(weight, after, value)
    facts |= {} if error is None else {"error": error}
    if step.format is None and (odd := watch(weight, result, error, lambda: value)):
        facts["notes"] = odd
    if after.sparsity is not None:
        check_mask(weight, after.sparsity, result)
    packs = step.format is not None and not step.format.plain(weight, after)
    parts = step.format.encode_as(weight, after, result) if packs and step.format else qtensor.stored(weight, result)
    del result
    for name in wanted:
        if name not in written:
            written[name] = writer.put(name, parts[name])
    return written, facts


def check_mask(weight: Weight, sparsity: Sparsity, value: Any) -> None:
    """A pass that was to keep, or to make, a pattern of zeros must have done so."""
    from compress.numerics import masks

    nonzero = value.nonzero() if isinstance(value, qtensor.QTensor) else value != 0
    if not masks.holds(qtensor.along_inputs(weight, nonzero), sparsity):
        raise AssertionError(f"{weight.name} is not masked({sparsity}) after this pass")


def _carry(source: Checkpoint, writer: Writer, there: str, here: str) -> None:
    ref = source.refs[here]
    writer.copy(there, source.descriptor(ref.file), ref.offset)
