"""One token: which inputs are taken by forwards that are one call of ours."""

from __future__ import annotations

from typing import Any

import torch

from compress.kernels.native.op import needs_operator

MOST = 16
"""Texts up to which one thread is faster than torch's many."""


def takes(x: Any, like: torch.Tensor) -> bool:
    """Whether x is one token of each of a few texts, in plain numbers of that dtype on the CPU."""
    return (
        not needs_operator(x, None)
        and x.dtype == like.dtype
        and x.device.type == "cpu"
        and x.is_contiguous()
        and x.dim() > 1
        and x.shape[-2] == 1
        and 0 < x.numel() <= MOST * x.shape[-1]
    )


def takes_rotated(x: Any, angles: Any, size: int) -> bool:
    """The same of x [texts, 1, width] with angles (cos, sin) [texts or 1, 1, size] of that token."""
    return (
        angles is not None
        and x.dim() == 3
        and takes(x, angles[0])
        and all(
            one.dim() == 3 and one.shape[1:] == (1, size) and one.shape[0] in (1, x.shape[0]) and one.is_contiguous()
            for one in angles
        )
    )
