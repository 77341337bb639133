"""Products of fp32 matrices on a processor's units for bfloat16, summed in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_bfloat16(wanted: bool) -> Iterator[None]:
    """If `wanted`, rounds the factors of fp32 products to bfloat16 where the CPU has units for that: two to four times as fast.

    Of factors that are such numbers already nothing is lost: a product of two has 16 bits, and fp32, which they are added up
    in, holds 24. Where there are no such units, products are in fp32 as ever.
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
