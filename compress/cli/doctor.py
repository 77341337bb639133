"""`compress doctor`: which backend runs what on this machine, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded

if TYPE_CHECKING:
    from compress.evaluate.backend_report import Answer


def register(app: typer.Typer) -> None:
    app.command("doctor")(command)


@guarded
def command(
    artifact: Annotated[
        Path | None, typer.Argument(help="An artifact of pack(format=native); else every kind of weight.", show_default=False)
    ] = None,
    backend: options.Backend = None,
    device: options.Device = "auto",
    dtype: options.ComputeDtype = "auto",
    details: options.Details = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Say which backend runs packed weights on this machine, and why each faster one cannot."""
    options.one_of("--dtype", dtype, options.DTYPES)
    options.one_of("--device", device, options.DEVICES)
    from compress.evaluate import backend_report

    where = backend_report.default_device() if device == "auto" else device
    dtypes = list(backend_report.DTYPES) if dtype == "auto" else [dtype]
    if artifact is None:
        uses = {name: list(backend_report.families(name, where)) for name in dtypes}
    else:
        from compress.checkpoint.reader import open_checkpoint

        checkpoint = open_checkpoint(artifact)
        uses = {"": backend_report.artifact_uses(checkpoint, where, None if dtype == "auto" else dtype)}
    answers = {name: [backend_report.answer(use, backend) for use in found] for name, found in uses.items()}
    machine = {**backend_report.machine(), "device": where}
    if json_:
        every = [facts(one) for found in answers.values() for one in found]
        print(json.dumps({"machine": machine, "answers": every}, ensure_ascii=False))
        return
    show_machine(machine)
    if artifact is None:
        show_families(answers, details)
        return
    for one in backend_report.alike(answers[""]):
        print(f"{one.use.weights} weights {one.use.what} {_dtype(one)}: {one.backend or 'nothing'}")
        for names, reason in by_reason(one.passed_over):
            console.text(f"    {names} passed over: {reason}", 8)


def facts(one: Answer) -> dict[str, Any]:
    """An answer as JSON."""
    work = one.use.work
    return {
        "what": one.use.what, "weights": one.use.weights, "rows": work.rows, "columns": work.columns, "dtype": _dtype(one),
        "backend": one.backend, "passed_over": one.passed_over,
    }  # fmt: skip


def by_reason(passed_over: dict[str, str]) -> list[tuple[str, str]]:
    """(backends, reason): backends that are passed over for the same reason, joined."""
    found: dict[str, list[str]] = {}
    for name, reason in passed_over.items():
        found.setdefault(reason, []).append(name)
    return [(", ".join(names), reason) for reason, names in found.items()]


def _without(reason: str, *words: str) -> str:
    for word in words:
        reason = reason.replace(word, "it")
    return reason


def _dtype(one: Answer) -> str:
    return str(one.use.work.dtype).removeprefix("torch.")


def show_machine(machine: dict[str, Any]) -> None:
    """Prints CPU, GPUs, libraries and drivers."""
    memory = console.size(machine["memory_bytes"])
    console.fact("cpu", f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, {memory}")
    for gpu in machine["gpus"] or [None]:
        words = f"{gpu['name']}, capability {gpu['capability']}, {console.size(gpu['memory_bytes'])}" if gpu else "none"
        console.fact("gpu", words)
    console.fact("driver", machine["driver"])
    console.fact("torch", f"{machine['torch']} (CUDA {machine['torch_cuda']}), transformers {machine['transformers']}")
    console.fact("triton", machine["triton"])
    console.fact("nvrtc", machine["nvrtc"])
    console.fact("simd", machine["cpu_kernels"])
    for capability, code in machine["code"].items():
        console.fact("code", f"for capability {capability}: {code}")
    console.fact("device", machine["device"] + (f" (on cuda: {machine['no_cuda']})" if machine["no_cuda"] else ""))


def show_families(answers: dict[str, list[Answer]], details: bool) -> None:
    """Prints a row for each kind of weight and a column for each dtype; with --details why backends are passed over."""
    rows = [(row[0].use.what, *(one.backend or "nothing" for one in row)) for row in zip(*answers.values(), strict=True)]
    console.table(("weights", *answers), rows, "dtypes of activations, and the fastest backend that takes such weights")
    if not details:
        console.fact("why", "`compress doctor --details` says why faster backends are passed over")
        return
    print("\npassed over:")
    for (names, reason, dtypes), kinds in reasons(answers).items():
        within = f" in {', '.join(dtypes)}" if len(dtypes) < len(answers) else ""
        console.text(f"{names}: {reason}", 4)
        console.text(f"    for {'all' if len(kinds) == len(rows) else '; '.join(kinds)}{within}", 8)


def reasons(answers: dict[str, list[Answer]]) -> dict[tuple[str, str, tuple[str, ...]], list[str]]:
    """(backends, reason, dtypes) -> kinds of weights that they are passed over for."""
    dtypes: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for dtype, found in answers.items():
        for one in found:
            # Without the names of state and scheme: with them every kind of weight would have reasons of its own.
            state = one.use.work.state
            refusals = {name: _without(why, str(state), str(state.scheme or state)) for name, why in one.passed_over.items()}
            for names, reason in by_reason(refusals):
                key = (names, reason, one.use.what)
                dtypes[key] = (*dtypes.get(key, ()), dtype)
    grouped: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (names, reason, kind), where in dtypes.items():
        grouped.setdefault((names, reason, where), []).append(kind)
    return grouped
