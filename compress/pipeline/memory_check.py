"""Memory check: refuses a plan that needs more memory than this machine has.

The limit is all that this process may ever have: the machine's memory or, if smaller, the limit of a cgroup that it is in
(containers, batch systems). It is not the memory that is free now, which other programs change during a run: a run that fits
might be refused, and the other way round. Swap does not count: every pass reads all of its memory again and again.
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
"""Controller in a line of /proc/self/cgroup -> (its folder, the file with the limit); v2 names no controller."""


def machine_bytes(root: Path = Path("/")) -> int:
    """Most bytes of memory that this process may have; `root` is where /proc and /sys lie."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Limits of the cgroups that this process is in, and of their parents, v1 and v2."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, group = line.split(":", 2)
        for controller in _LIMITS.keys() & controllers.split(","):
            place, file = _LIMITS[controller]
            top = root / "sys/fs/cgroup" / place
            own = top / group.lstrip("/")
            # In a container the line may name a group that only the host sees; the root folder is then the container's.
            for folder in (own, *own.parents):
                if folder.is_relative_to(top) and (folder / file).is_file():
                    text = (folder / file).read_text().strip()
                    yield from [int(text)] if text.isdecimal() else []


def lacking(plan: Plan, there_bytes: int) -> list[Problem]:
    """A problem for each step that needs more memory than there is."""
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
    """A problem for each step that needs more memory than is free on a GPU."""
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
    """Raises MachineError if a step's predicted peak exceeds the memory of the machine or the GPU."""
    if problems := lacking(plan, machine_bytes()) + lacking_there(plan, device):
        raise MachineError(problems)
