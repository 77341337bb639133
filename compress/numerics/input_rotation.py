"""Input rotation: each block of a weight's inputs mixed by a Hadamard matrix.

MR-GPTQ (Egiazarian et al., 2509.23202); QuIP# (Tseng et al., 2402.04396). Legend: n inputs of a block; H [n, n] Sylvester's
matrix, symmetric, so that R = H / sqrt(n) is orthogonal and its own inverse; x [..., width], n divides the width.

x W^T = (x R) (W R)^T: codes are those of W R, of which no entry stands out as one of W may, and the same holds of x R where
activations are rounded. Unlike rotations that fold into other weights (passes/quantize/rotate.py), x R is computed as the model
runs: n additions for an input, a share of n / rows of what the product itself takes.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from compress.numerics.rotation import hadamard


@lru_cache
def _matrix(n: int, device: torch.device) -> torch.Tensor:
    """R in fp32. Made on the CPU, so that it is the same everywhere."""
    found: torch.Tensor = (hadamard(n) / n**0.5).float().to(device)
    return found


def rotated(x: torch.Tensor, n: int) -> torch.Tensor:
    """x R along the last axis, in x's dtype; summed in fp32. `x` itself for n = 0. Its own inverse, up to rounding."""
    if not n:
        return x
    found: torch.Tensor = x.float().unflatten(-1, (-1, n)) @ _matrix(n, x.device)
    return found.flatten(-2).to(x.dtype)


def rotated_both(h: torch.Tensor, n: int) -> torch.Tensor:
    """R^T M R of a matrix [width, width]; `h` itself for n = 0."""
    return rotated(rotated(h, n).T, n).T.contiguous() if n else h
