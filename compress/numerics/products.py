"""Products of fp32 matrices on a CPU's bfloat16 units, summed in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_bfloat16(wanted: bool) -> Iterator[None]:
    """If `wanted`, rounds the factors of fp32 products to bfloat16 on CPUs with units for that: two to four times as fast.

    Nothing is lost if the factors are bfloat16 numbers already: a product of two has 16 bits, and the fp32 sum holds 24.
    On CPUs without such units, products stay in fp32.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not wanted or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
