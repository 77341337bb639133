"""Ours: one row measured by the installed command, as a user types it: plan, run, eval, each a fresh process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.errors import CompressError

from .process import Usage, measure
from .rows import Protocol, Row, eval_command, plan_command, run_command


class RowError(CompressError):
    """A command of a row failed; its own message is what is told."""


def measured(row: Row, protocol: Protocol, compress: str, scratch: Path) -> dict[str, Any]:
    """Everything of a row. Raises RowError. OUT and its steps are removed."""
    if not row.passes:
        return {"tensor_bytes": tensor_bytes(protocol.model), **evaluated(protocol.model, protocol, compress, scratch)}
    recipe, out = row.recipe(protocol), scratch / "out"
    planned, _ = said(plan_command(compress, recipe, protocol), scratch / "plan.log")
    command = run_command(compress, recipe, protocol, out)
    try:
        done, usage = said(command, scratch / "run.log")
        found = {
            "recipe": recipe, "command": shown(command, protocol, out), "run": usage.facts(), "planned_bytes": planned["peak_resident_bytes"],
            "of_plan": round(usage.peak_bytes / planned["peak_resident_bytes"], 3), "tensor_bytes": tensor_bytes(out),
            "bits_per_weight": done["bits_per_targeted_weight"], "steps": done["steps"], "notes": done["notes"],
        }  # fmt: skip
        return {**found, **evaluated(out, protocol, compress, scratch)}
    finally:
        for folder in (out, out.with_name("out.steps")):
            shutil.rmtree(folder, ignore_errors=True)


def evaluated(artifact: Path, protocol: Protocol, compress: str, scratch: Path) -> dict[str, Any]:
    """What `compress eval` says of an artifact, ours or another tool's, on each text. Raises RowError."""
    command = eval_command(compress, artifact, protocol, protocol.text)
    quality, usage = said(command, scratch / "eval.log")
    found = {"eval_command": shown(command, protocol, artifact), "eval": usage.facts(), "quality": measures(quality)}
    if protocol.also is not None:
        quality, _ = said(eval_command(compress, artifact, protocol, protocol.also), scratch / "also.log")
        found["also"] = {"text": protocol.also.name, "quality": measures(quality)}
    return found


def measures(quality: dict[str, Any]) -> dict[str, Any]:
    """What was measured, without the names of what it was measured on."""
    return {name: value for name, value in quality.items() if isinstance(value, dict)}


def shown(command: list[str], protocol: Protocol, out: Path) -> list[str]:
    """A command as a person would type it, without the folders of this machine."""
    names = {str(protocol.model): "MODEL", str(out): "OUT"}
    folders = {f"{path.parent}/" for path in (protocol.text, protocol.calibrate, protocol.also) if path is not None}
    words = ["compress", *(names.get(word, word) for word in command[1:])]
    for folder in folders:
        words = [word.replace(folder, "") for word in words]
    return words


def said(command: list[str], log: Path) -> tuple[dict[str, Any], Usage]:
    """The last JSON object that a command printed, and what it took. Raises RowError with what it said when it failed."""
    usage = measure(command, log)
    events = list(objects(log.with_suffix(".out")))
    if usage.status == 0 and events:
        return events[-1], usage
    problem: dict[str, str] = next((p for event in [*events, *objects(log)] for p in event.get("problems", ())), {})
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    got = ": ".join(part for part in (problem.get("where"), problem.get("got")) if part) or (
        lines[-1] if lines else "nothing said"
    )
    raise RowError(f"compress {command[1]}", problem.get("expected", ""), f"status {usage.status}: {got}", problem.get("do", ""))


def objects(file: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line; other lines are passed over."""
    for line in file.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def tensor_bytes(artifact: Path) -> int:
    """Bytes of a checkpoint's tensors on disk, with their headers."""
    return sum(file.stat().st_size for file in artifact.glob("*.safetensors") if file.name != "calibration.safetensors")
