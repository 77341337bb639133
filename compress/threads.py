"""Threads: the cores that a process computes on, and workers with one each.

torch has one number for a whole process. A thread that sets it, as a worker does that is to compute alone, sets what every
thread takes that has computed nothing yet, the main thread included. So nobody else calls `torch.set_num_threads`:
`compute_threads` says the number and puts back what was there, `workers` keeps its own number from everybody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Cores for this process: OMP_NUM_THREADS, or its share of those that it may use, by affinity and by cgroup.

    `torchrun` sets OMP_NUM_THREADS to 1 where nobody has set it, so that a machine with eight ranks computes on eight cores
    whatever it has: there, one counts as not said.
    """
    ranks = _whole(os.environ.get("LOCAL_WORLD_SIZE", "")) or 1
    said = _whole(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    if said and (said > 1 or "TORCHELASTIC_RUN_ID" not in os.environ):
        return said
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(root)) // ranks)


@contextmanager
def compute_threads(threads: int | None) -> Iterator[None]:
    """Computes on so many cores, None for `available`; afterwards on as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(available() if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workers(count: int, each: int = 1) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that compute on one core each, or on `each`: nested pools would fight over them.

    Errors cancel what has not begun.
    """
    import torch

    before = torch.get_num_threads()  # asked before a worker says one, or this thread takes that for its own
    try:
        with ThreadPoolExecutor(max_workers=max(1, count), initializer=lambda: torch.set_num_threads(each)) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)


def _whole(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _quota(root: Path) -> int:
    """Cores that a container's limit of processor time comes to, at least one; a very large number without one."""
    try:
        most, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return 1 << 20
    return max(1, round(int(most) / int(period))) if most.isdecimal() else 1 << 20
