"""Threads: the cores that a process computes on, and pools of worker threads.

torch has one thread count for a whole process. If a worker thread sets it, to compute on one core, it also changes the count
of every thread that has not computed yet, the main thread included. So only this file calls `torch.set_num_threads`:
`compute_threads` sets the number and restores it, `workers` restores it after its own threads have set theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Cores for this process: OMP_NUM_THREADS, or its share of the cores that affinity and cgroup allow.

    `torchrun` sets OMP_NUM_THREADS to 1 unless it is set, so that a machine with eight ranks would compute on only eight
    cores: under torchrun a value of 1 is ignored.
    """
    ranks = _whole(os.environ.get("LOCAL_WORLD_SIZE", "")) or 1
    said = _whole(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    if said and (said > 1 or "TORCHELASTIC_RUN_ID" not in os.environ):
        return said
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(root)) // ranks)


@contextmanager
def compute_threads(threads: int | None) -> Iterator[None]:
    """Computes on this many cores, None for `available`; restores the previous number afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(available() if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workers(count: int, each: int = 1) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that compute on `each` cores, by default one, so that they do not compete for cores.

    An error cancels tasks that have not begun.
    """
    import torch

    before = torch.get_num_threads()  # read before a worker sets its own, which this thread would adopt
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
    """Cores that correspond to a container's CPU quota, at least one; a very large number without a quota."""
    try:
        most, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return 1 << 20
    return max(1, round(int(most) / int(period))) if most.isdecimal() else 1 << 20
