"""`compress plan`: exact sizes, skips, memory and readers, from headers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.run import chosen_recipe
from compress.size import parse_size

if TYPE_CHECKING:
    from compress.errors import Problem
    from compress.plan import Plan


def register(app: typer.Typer) -> None:
    app.command("plan")(verb)


@guarded
def verb(
    model: options.Model,
    recipe: Annotated[str | None, typer.Argument(help="A recipe file or the name of a recipe that is installed.")] = None,
    passes: options.Passes = None,
    set_: options.Set = None,
    allow_skips: options.AllowSkips = None,
    shard_size: options.ShardSize = "5GB",
    layers: Annotated[bool, typer.Option("--layers", help="Print every weight.")] = False,
    allow_dtype_mismatch: options.AllowDtype = False,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what a recipe would make of MODEL; a Hub id is planned from its headers, without a download."""
    found = chosen_recipe(recipe, passes, set_)
    limit = parse_size(shard_size)
    from compress.contract import Context
    from compress.entry import enter
    from compress.memory import lacking, machine_bytes
    from compress.plan import make_plan
    from compress.resolve import resolve as resolve_recipe
    from compress.source import open_headers

    resolve_recipe(found)
    console.presets(found)
    checkpoint = open_headers((found.model or model) if model == "-" else model, trust_remote_code)
    console.warn_of_code(checkpoint)
    model_, meaning = enter(found, checkpoint, allow_dtype_mismatch)
    skips, threads = tuple(allow_skips or ()), Context().threads
    plan = make_plan(found, checkpoint, model_, threads, skips, shard_bytes=limit, meaning=meaning)
    there_bytes = machine_bytes()
    if json_:
        print(json.dumps({**facts(plan, layers), "machine_memory_bytes": there_bytes}, ensure_ascii=False))
    else:
        show(plan, checkpoint.name, layers, lacking(plan, there_bytes))


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


def show(plan: Plan, name: str, layers: bool, lacking: list[Problem]) -> None:
    """The plan as tables."""
    print(f"model:    {name} ({plan.model.family}), {console.size(plan.source_bytes)}, "
          + ", ".join(f"{blocks} {stack} blocks" for stack, blocks in plan.model.stacks.items()))  # fmt: skip
    rows = [
        (
            step.pass_.line(), f"{step.payload_bytes:,}", f"{step.disk_bytes:,}", f"{plan.bits(step, step.transformed):.3f}",
            f"{plan.bits(step):.3f}", f"{len(step.transformed)}/{len(step.targeted)}",
        )
        for step in plan.steps
    ]  # fmt: skip
    console.table(("pass", "tensor bytes", "bytes on disk", "bits/weight", "over all", "weights"), rows)
    for step in plan.steps:
        for note in step.notes:
            if step is plan.steps[-1] or note.what in ("skipped", "ragged", "undecided"):
                print(f"{note.what}: {note.count} ({note.reason})")
    if layers:
        last = plan.steps[-1]
        console.table(
            ("weight", "kind", "shape", "becomes", "bits"),
            [(w.name, w.kind, "x".join(map(str, w.shape)), last.after[w.name], f"{last.bits([w]):.3f}") for w in plan.weights],
        )
    print(f"memory:   at most {console.size(plan.peak_bytes)} resident")
    for problem in lacking:
        print(f"memory:   does not fit: {problem.where} needs {problem.expected}; there are {problem.got}; {problem.do}")
    print(f"disk:     {plan.disk_bytes:,} bytes added until `compress clean`")
    for verdict in plan.verdicts:
        print(f"reader:   {verdict.reader}: {verdict.loads} ({verdict.reason})")
