"""`compress plan`: exact sizes, skips, memory and readers, from headers."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.recipes import settings, to_set
from compress.cli.run import chosen_recipe
from compress.spec.byte_size import parse_size
from compress.threads import available

if TYPE_CHECKING:
    import torch

    from compress.contract.step_plan import Plan, StepPlan
    from compress.errors import Problem
    from compress.hub.recipe import PlannedPush

_COLUMNS = (
    "weights: how many the pass works on, of those that it targets; bits/weight: of these, scales and padding included; "
    "over all: of the whole model"
)

_ALWAYS = ("skipped", "left alone by default", "ragged", "costs", "undecided", "kv cache", "no kv cache")
"""Counted lines that are printed for every step, not for the last alone."""


def register(app: typer.Typer) -> None:
    app.command("plan")(command)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles: a plan keeps all that it makes, and looking through that takes a third of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            # What there is counts as old; else the next search would look through all of it at once.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


@guarded
@uncollected()
def command(
    model: options.Model,
    recipe: options.Recipe = None,
    passes: options.Passes = None,
    set_: options.Set = None,
    allow_skips: options.AllowSkips = None,
    shard_size: options.ShardSize = "5GB",
    threads: options.Threads = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print every weight.")] = False,
    device: options.On = "auto",
    details: options.Details = False,
    allow_dtype_mismatch: options.AllowDtype = False,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what a recipe would make of MODEL; a Hub id is planned from its headers, without a download."""
    found = chosen_recipe(recipe, passes, set_)
    limit = parse_size(shard_size)
    from compress.checkpoint.source import open_headers
    from compress.cli.push import note
    from compress.device import resolve as resolve_device
    from compress.hub.recipe import planned_push
    from compress.layerwise.memory_estimate import computing
    from compress.pipeline.entry import enter
    from compress.pipeline.memory_check import lacking, lacking_there, machine_bytes
    from compress.pipeline.plan import PlanOptions, make_plan
    from compress.pipeline.resolve import resolve as resolve_recipe

    resolve_recipe(found)
    where = resolve_device(device)
    console.presets(found)
    checkpoint = open_headers((found.model or model) if model == "-" else model, trust_remote_code)
    console.warn_of_code(checkpoint)
    model_, dense_view = enter(found, checkpoint, allow_dtype_mismatch)
    skips = tuple(allow_skips or ())
    dtype = str(computing("auto", checkpoint.config, where)).removeprefix("torch.")
    options = PlanOptions(threads or available(), skips, limit, dtype)
    plan = make_plan(found, checkpoint, model_, options, dense_view=dense_view)
    pushed = planned_push(found, checkpoint, note)
    there_bytes = machine_bytes()
    if json_:
        print(
            json.dumps(
                {**facts(plan, layers), "machine_memory_bytes": there_bytes, **on_device(plan, where), **pushing(pushed)},
                ensure_ascii=False,
            )
        )
    else:
        there = on_device(plan, where)
        show(plan, checkpoint.name, layers, details, [*lacking(plan, there_bytes), *lacking_there(plan, where)], there)
        for line in pushing(pushed).values():
            console.fact("push", line)
        if left := to_set(found):
            console.fact("open", "placeholders, for which `compress run` needs values:")
            print(f"          {settings(left)}")


def pushing(planned: PlannedPush | None) -> dict[str, str]:
    """Where the output will be pushed to, in words; empty for a recipe without a push."""
    if planned is None:
        return {}
    target, options = planned.target, planned.options
    kind = ("private" if target.private else "public") if target.exists else "new, private" if target.private else "new"
    way = "a pull request" if options.pr else target.revision
    verified = f"verified by {planned.reader} first" if planned.reader else "not verified, and the card says so"
    return {"push": f"to {target.repo} ({kind}, {way}) by {target.user}; licence {planned.licence}; {verified}"}


def on_device(plan: Plan, where: torch.device) -> dict[str, Any]:
    """GPU memory that the plan needs and that the GPU has; empty for the CPU."""
    from compress.device import memory_of, name_of

    if where.type != "cuda":
        return {}
    free, whole = memory_of(where)
    need = max(step.device_bytes for step in plan.steps)
    return {"device": {"name": str(where), "gpu": name_of(where), "peak_bytes": need, "free_bytes": free, "memory_bytes": whole}}


def facts(plan: Plan, layers: bool) -> dict[str, Any]:
    """The plan as JSON."""
    found: dict[str, Any] = {
        "source_bytes": plan.source_bytes,
        "peak_resident_bytes": plan.peak_bytes,
        "added_disk_bytes": plan.disk_bytes,
        "steps": [
            {
                "pass": str(step.pass_.line()), "payload_bytes": step.payload_bytes, "disk_bytes": step.disk_bytes,
                "bits_per_weight": plan.bits(step), "bits_per_targeted_weight": plan.bits(step, step.transformed),
                "targeted": len(step.targeted), "skipped": step.skipped,
                "notes": [{"what": n.what, "reason": n.reason, "count": n.count} for n in step.notes],
            }
            for step in plan.steps
        ],
        "readers": [verdict.__dict__ for verdict in plan.verdicts],
    }  # fmt: skip
    if layers:
        last = plan.steps[-1]
        found["weights"] = {w.name: {"state": str(last.after[w.name]), "bits": last.bits([w])} for w in plan.weights}
    return found


def show(plan: Plan, name: str, layers: bool, details: bool, lacking: list[Problem], device: dict[str, Any]) -> None:
    """Prints the plan as tables."""
    stacks = ", ".join(f"{blocks} {stack} blocks" for stack, blocks in plan.model.stacks.items())
    console.fact("model", f"{name} ({plan.model.family}), {console.size(plan.source_bytes)}, {stacks}")
    if details:
        for step in plan.steps:
            console.fact(f"step {step.number}", str(step.pass_.line()))
    head: tuple[str, ...] = ("step", "pass", "weights", "bits/weight", "over all", "bytes on disk")
    columns = _COLUMNS
    if details:
        head, columns = (*head, "tensor bytes"), f"{columns}; tensor bytes: of what is on disk"
    console.table(head, [row(plan, step)[: len(head)] for step in plan.steps], columns)
    for step in plan.steps:
        for note in step.notes:
            if details or step is plan.steps[-1] or note.what in _ALWAYS:
                console.text(f"{f'step {step.number}: ' if details else ''}{note.what}: {note.count} ({note.reason})")
    if layers:
        last = plan.steps[-1]
        console.table(
            ("weight", "kind", "shape", "becomes", "bits"),
            [(w.name, w.kind, "x".join(map(str, w.shape)), last.after[w.name], f"{last.bits([w]):.3f}") for w in plan.weights],
            "bits: of each entry of the weight, scales and padding included",
        )
    console.fact("memory", f"at most {console.size(plan.peak_bytes)} resident")
    if there := device.get("device"):
        need = f"at most {console.size(there['peak_bytes'])}" if there["peak_bytes"] else "nothing is computed there"
        console.fact("device", f"{there['name']} ({there['gpu']}): {need}; {console.size(there['free_bytes'])} free")
    for problem in lacking:
        lack = f"{problem.where} needs {problem.expected}; there are {problem.got}; {problem.do}"
        console.fact("memory", f"does not fit: {lack}")
    console.fact("disk", f"{plan.disk_bytes:,} bytes added until `compress clean`")
    for verdict in plan.verdicts:
        console.fact("reader", f"{verdict.reader}: {verdict.loads} ({verdict.reason})")


def row(plan: Plan, step: StepPlan) -> tuple[str, ...]:
    """A step as cells of the table; a dash for a step that changes no weights."""
    touched = step.transformed
    return (
        str(step.number), step.name, f"{len(touched)}/{len(step.targeted)}" if step.targeted else "-",
        f"{plan.bits(step, touched):.3f}" if touched else "-", f"{plan.bits(step):.3f}",
        "-" if step.inherits else f"{step.disk_bytes:,}", "-" if step.inherits else f"{step.payload_bytes:,}",
    )  # fmt: skip
