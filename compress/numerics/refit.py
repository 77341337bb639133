"""Refit: least squares for the entries that a mask keeps, row by row.

Legend: W [rows, n] weights, Q what becomes of them, zero outside the mask M; D = W - Q; H and lambda as in hessian.py.

Each row minimizes d (H + lambda I) d^T over the entries that are kept. Every row has a mask and so a matrix of its own, of which
a factorization would take n^3 / 24 operations at half of the entries; conjugate gradients take two products with all of H for
every row at once and as many steps as are worth it, and never raise the loss. They are preconditioned by H's diagonal.
"""

from __future__ import annotations

import torch

from compress.numerics.hessian import energies

DAMPING = 0.01
"""lambda as a share of H's mean diagonal, where no other is asked for."""
LEAST_TOKENS = 32
"""Inputs with fewer tokens say too little for a fit."""
_ROWS = 2048
"""Rows solved at a time."""


def refit(
    w: torch.Tensor, q: torch.Tensor, keep: torch.Tensor, hessian: torch.Tensor, damping: float, steps: int = 16
) -> torch.Tensor:
    """Q [rows, n] in its dtype with refitted entries; a row whose outputs would not come nearer to W's keeps what it has.

    `damping` is lambda as a share of H's mean diagonal.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean()
    scale = torch.where(diagonal > 0, 1 / diagonal, 0)[:, None]
    parts = []
    for whole, old, mask in zip(w.split(_ROWS), q.split(_ROWS), keep.split(_ROWS), strict=True):
        solved = _solve(whole, old, mask, damped, scale, steps).to(q.dtype)
        was, now = (energies((whole.to(hessian.dtype) - new.to(hessian.dtype)).T, hessian) for new in (old, solved))
        parts.append(torch.where((now < was)[:, None], solved, old))
    return torch.cat(parts)


def _solve(
    w: torch.Tensor, q: torch.Tensor, keep: torch.Tensor, damped: torch.Tensor, scale: torch.Tensor, steps: int
) -> torch.Tensor:
    """Conjugate gradients from Q, for all rows side by side; [rows, n] in the Hessian's dtype."""
    found = q.T.to(damped.dtype, copy=True, memory_format=torch.contiguous_format)
    mask = keep.T.to(damped.dtype, memory_format=torch.contiguous_format)
    residual = (damped @ (w.T.to(damped.dtype) - found)).mul_(mask)
    direction = residual * scale
    energy = (residual * direction).sum(0)
    for _ in range(steps):
        product = damped @ direction
        curve = (product * direction).sum(0)
        step = torch.where(curve > 0, energy / curve, 0)
        found.addcmul_(direction, step)
        residual.addcmul_(product.mul_(mask), step, value=-1)
        # The preconditioned residual, in the place of a product that is no longer needed.
        torch.mul(residual, scale, out=product)
        new = (product * residual).sum(0)
        direction.mul_(torch.where(energy > 0, new / energy, 0)).add_(product)
        energy = new
    return found.T
