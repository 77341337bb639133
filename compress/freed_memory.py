"""Freed memory: when it goes back to the system, as far as glibc is told.

By itself glibc takes ever larger blocks out of pools after it has seen them freed, up to 32 MiB, and hands what is larger back at
once. Where streams of tensors of some megabytes go by, pools are left full of gaps; where the same activations are made at every
step, handing them back and clearing them anew takes up to a third of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's malloc."""
_ALONE = 32 << 20
"""As far as glibc goes by itself with what it takes from pools."""
_ALL = (1 << 31) - 1


def trim_memory() -> None:
    """Hands freed memory back to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Meanwhile memory of some megabytes goes back to the system when it is freed."""
    with _taken_from_pools(8 << 20, 16 << 20):
        yield


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Meanwhile all freed memory is kept for what comes next."""
    with _taken_from_pools(_ALL, _ALL):
        yield


@contextmanager
def _taken_from_pools(most_bytes: int, kept_bytes: int) -> Iterator[None]:
    """Has glibc map what is larger by itself, and keep that much at the end of a pool; then trims."""
    _set(most_bytes, kept_bytes)
    try:
        yield
    finally:
        _set(_ALONE, 2 * _ALONE)
        trim_memory()


def _set(most_bytes: int, kept_bytes: int) -> None:
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, most_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, kept_bytes)
