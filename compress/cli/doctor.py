"""`compress doctor`: which backend runs what on this machine, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.formats import mark
from compress.cli.guard import guarded

if TYPE_CHECKING:
    from compress.doctor import Answer


def register(app: typer.Typer) -> None:
    app.command("doctor")(verb)


@guarded
def verb(
    artifact: Annotated[
        Path | None, typer.Argument(help="An artifact of pack(format=native); else every kind of weight.", show_default=False)
    ] = None,
    backend: options.Backend = None,
    device: options.Device = "auto",
    dtype: options.ComputeDtype = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Say what this machine runs packed weights with, and why each faster backend is passed over."""
    options.one_of("--dtype", dtype, options.DTYPES)
    options.one_of("--device", device, options.DEVICES)
    from compress import doctor

    where = doctor.default_device() if device == "auto" else device
    dtypes = list(doctor.DTYPES) if dtype == "auto" else [dtype]
    if artifact is None:
        uses = {name: list(doctor.families(name, where)) for name in dtypes}
    else:
        from compress.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(artifact)
        uses = {"": doctor.artifact_uses(checkpoint, where, None if dtype == "auto" else dtype)}
    answers = {name: [doctor.answer(use, backend) for use in found] for name, found in uses.items()}
    machine = {**doctor.machine(), "device": where}
    if json_:
        every = [facts(one) for found in answers.values() for one in found]
        print(json.dumps({"machine": machine, "answers": every}, ensure_ascii=False))
        return
    show_machine(machine)
    if artifact is None:
        show_families(answers)
        return
    for one in doctor.alike(answers[""]):
        reasons = "; ".join(f"{names} passed over: {reason}" for names, reason in by_reason(one.passed_over))
        said = f"{one.use.weights} weights {one.use.what} {_dtype(one)}: {one.backend or 'nothing'}"
        print(f"{said}; {reasons}" if reasons else said)


def facts(one: Answer) -> dict[str, Any]:
    """An answer as JSON."""
    work = one.use.work
    return {
        "what": one.use.what, "weights": one.use.weights, "rows": work.rows, "columns": work.columns, "dtype": _dtype(one),
        "backend": one.backend, "passed_over": one.passed_over,
    }  # fmt: skip


def by_reason(passed_over: dict[str, str]) -> list[tuple[str, str]]:
    """Backends that are passed over for one reason, together, and the reason."""
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
    """What there is to run on."""
    memory = console.size(machine["memory_bytes"])
    print(f"cpu:      {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, {memory}")
    for gpu in machine["gpus"] or [None]:
        words = f"{gpu['name']}, capability {gpu['capability']}, {console.size(gpu['memory_bytes'])}" if gpu else "none"
        print(f"gpu:      {words}")
    print(f"driver:   {machine['driver']}")
    print(f"torch:    {machine['torch']} (CUDA {machine['torch_cuda']}), transformers {machine['transformers']}")
    print(f"triton:   {machine['triton']}")
    print(f"nvrtc:    {machine['nvrtc']}")
    for capability, code in machine["code"].items():
        print(f"code:     for capability {capability}: {code}")
    print(f"device:   {machine['device']}" + (f" (on cuda: {machine['no_cuda']})" if machine["no_cuda"] else ""))


def show_families(answers: dict[str, list[Answer]]) -> None:
    """A row for each kind of weight and a column for each dtype; why a backend is passed over is told below."""
    reasons: dict[str, int] = {}

    def cell(one: Answer) -> str:
        # Without the names of state and scheme, for which reasons would be as many as these.
        state = one.use.work.state
        told = {name: _without(reason, str(state), str(state.scheme or state)) for name, reason in one.passed_over.items()}
        marks = [mark(f"{names}: {reason}", reasons) for names, reason in by_reason(told)]
        return " ".join([one.backend or "nothing", "".join(marks)]).rstrip()

    rows = [(row[0].use.what, *map(cell, row)) for row in zip(*answers.values(), strict=True)]
    console.table(("weights", *answers), rows)
    print("\npassed over:" if reasons else "")
    for reason, number in reasons.items():
        print(f"[{number}] {reason}")
