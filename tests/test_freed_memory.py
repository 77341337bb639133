"""Memory that is freed between two steps of the same size: kept for the next one, or back at the system."""

from __future__ import annotations

import platform

import pytest

from forked import python

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")

FAULTS = """
import ctypes, resource, sys, torch
from compress import freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages are counted, of which a huge one holds 512
with getattr(freed_memory, sys.argv[1])():
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 << 20, dtype=torch.uint8)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("how", "least", "most"), [("large_blocks_kept", 0, 100), ("large_blocks_returned", 16_384, 20_000)])
def test_pages_that_the_system_clears_for_a_step_like_the_one_before(how: str, least: int, most: int) -> None:
    found = python(FAULTS, how)
    assert found.returncode == 0, found.stderr
    # The best of some steps: what lies between blocks at first is merged with them.
    assert least <= min(map(int, found.stdout.split())) <= most
