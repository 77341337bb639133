"""Memory check: what this machine has; a plan that needs more is refused.

Counted is all that this process may ever have: the machine's memory or, where it is smaller, the limit of a cgroup that it is
in (containers, batch systems). Not what is free just now, which other programs change while a run goes on: one that fits could
then be refused, or the other way round. Not swap either: every pass reads all of its memory again and again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compress.contract.step_plan import INTERPRETER_BYTES, Plan
from compress.device import CPU, memory_of
from compress.errors import MachineError, Problem

if TYPE_CHECKING:
    import torch

_LIMITS = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}
"""Controllers of a line of /proc/self/cgroup -> (where their folders lie, the file with the limit); v2 names none."""


def machine_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have at most; `root` is where /proc and /sys lie."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Limits of the cgroups that this process is in and of those around them, v1 and v2."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, group = line.split(":", 2)
        for controller in _LIMITS.keys() & controllers.split(","):
            place, file = _LIMITS[controller]
            top = root / "sys/fs/cgroup" / place
            own = top / group.lstrip("/")
            # In a container the line may name a group that only the host sees; then the top is the container's own.
            for folder in (own, *own.parents):
                if folder.is_relative_to(top) and (folder / file).is_file():
                    text = (folder / file).read_text().strip()
                    yield from [int(text)] if text.isdecimal() else []


def lacking(plan: Plan, there_bytes: int) -> list[Problem]:
    """What is said of each step that needs more memory than there is."""
    return [
        Problem(
            f"step {step.number}: {step.name}",
            f"{need:,} bytes of memory, its predicted peak",
            f"{there_bytes:,} bytes that this machine, or the limit of its container, has",
            f"{step.pass_.how_to_use_less_memory()}, or take a machine with more; --allow-overcommit runs it anyway",
        )
        for step in plan.steps
        if (need := INTERPRETER_BYTES + step.resident_bytes) > there_bytes
    ]


def lacking_there(plan: Plan, device: torch.device) -> list[Problem]:
    """What is said of each step that needs more memory than is free on a GPU."""
    free, whole = memory_of(device) if device.type == "cuda" else (0, 0)
    return [
        Problem(
            f"step {step.number}: {step.name}",
            f"{step.device_bytes:,} bytes of the memory of {device}, its predicted peak",
            f"{free:,} bytes free of {whole:,}",
            f"{step.pass_.how_to_use_less_memory()}, end what else is there, or say --device cpu; "
            "--allow-overcommit runs it anyway",
        )
        for step in plan.steps
        if whole and step.device_bytes > free
    ]


def check_memory(plan: Plan, device: torch.device = CPU) -> None:
    """Raises MachineError where a step is predicted to need more memory than there is, here or on a GPU."""
    if problems := lacking(plan, machine_bytes()) + lacking_there(plan, device):
        raise MachineError(problems)
