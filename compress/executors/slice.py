"""Slice: runs a slicing pass: observes, decides, and writes the smaller model.

The decision is kept at once, and what was observed of each block before that, so that a crash costs one block or one tensor.
"""

from __future__ import annotations

import time

from compress.architecture.axes import Slice, rescaled
from compress.contract.slicing_pass import Observed, SlicingPass
from compress.contract.step_plan import Cut
from compress.executors.sliced import check, keep, put
from compress.executors.step_run import StepRun
from compress.executors.stream import write_each
from compress.executors.structure_scores import Observations
from compress.spec.kept import Kept
from compress.spec.weight_state import Weight


def cut(run: StepRun) -> dict[str, float]:
    """Writes every weight that is not journaled yet. Returns the seconds of each kind of work."""
    pass_, what = run.pass_, run.step.cut
    assert isinstance(pass_, SlicingPass)
    assert what is not None
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    kept = decided(run, pass_, what)
    seconds["observe"] = time.perf_counter() - started
    found = {part.name: part for part in what.parts(kept)}
    if "inputs" in pass_.facts():
        from compress.executors.output_fit import refit

        started = time.perf_counter()
        refit(run, kept, list(found.values()))
        seconds["refit"] = time.perf_counter() - started
    started = time.perf_counter()
    write(run, kept, found)
    seconds["write"] = time.perf_counter() - started
    return {name: round(spent, 3) for name, spent in seconds.items()}


def decided(run: StepRun, pass_: SlicingPass, what: Cut) -> Kept:
    """What is kept: by the decision of an interrupted run, or by a new one."""
    ctx, known = run.ctx, run.kept
    if ctx.broadcast(known is not None):
        return ctx.broadcast(known)  # type: ignore[no-any-return]
    observed = Observations(run, what, pass_.facts()).all() if pass_.facts() else Observed()
    kept: Kept = ctx.broadcast(pass_.keep(observed, what.before, what.after) if ctx.is_main else None)
    check(kept, what)
    if ctx.is_main:
        keep(run, kept)
    ctx.barrier()
    return kept


def write(run: StepRun, kept: Kept, found: dict[str, Slice]) -> None:
    """Cuts and writes the tensors that are not journaled yet."""
    pass_, what = run.pass_, run.step.cut
    assert isinstance(pass_, SlicingPass)
    assert what is not None

    def one(weight: Weight) -> None:
        part = found[weight.name]
        value = pass_.value(part, run.source.read(part.source.name), kept, what.before)
        put(run, weight, rescaled(value, part, what.family, what.before, what.after, what.tied))

    write_each(run, run.weights, one)
