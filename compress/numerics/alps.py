"""ALPS: finds mask and weights together, by alternating directions.

Meng et al., 2406.07831. Legend: W0 [rows, n] weights, H and lambda as in hessian.py, columns scaled so that X = H + lambda I has
ones on its diagonal; D sparse, W dense, which agree in the end; U the scaled dual of W = D; rho the weight of their difference.
    W = (W0 X + rho (D - U)) (X + rho I)^-1,    Z = W + U,    D = the largest entries of Z,    U = Z - D
U is what D leaves of Z, so Z and its mask are all that is kept between steps. Every few steps rho grows, the faster the more of
the mask still changes, until none does. What the mask keeps is then fitted by least squares (refit.py).

A share of zeros is chosen over a whole matrix, and the mask is not greedy: entries may come back. That takes some 40 products by
all of H, and an eigendecomposition, where SparseGPT takes one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.numerics.masks import keep_above, keep_first, keep_in_rows
from compress.spec.sparsity import Sparsity

_STEPS = 120
"""Most steps; masks settle after about 40."""
_EVERY = 3
"""Steps between changes of rho."""
_RHO = 0.1


def prune(
    w: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: Sparsity,
    damping: float,
    *,
    per_row: bool = False,
    heights: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q fp32, bool mask of what is kept), both [rows, n]; `heights` are the rows of each matrix, if `w` is several."""
    diagonal = hessian.diagonal()
    ridge = damping * diagonal.mean()
    scale = (diagonal + ridge).sqrt()
    x = hessian / scale / scale[:, None]
    x.diagonal().fill_(1)
    w = (w.to(x.dtype) * scale).masked_fill_(diagonal == 0, 0)
    aim = w @ x
    values, vectors = torch.linalg.eigh(x)
    heights, rho = heights or [len(w)], _RHO
    keep = _largest(w, sparsity, per_row, heights)
    z, settled = w * keep, keep
    inverse = (vectors / (values + rho)) @ vectors.T
    for step in range(1, _STEPS + 1):
        left = z.masked_fill(keep, 0)
        # rho (D - U): what is left of Z, with its sign turned.
        z = left.addmm_(torch.add(aim, torch.where(keep, z, -z), alpha=rho), inverse)
        keep = _largest(z, sparsity, per_row, heights)
        if step % _EVERY == 0:
            moved = int((keep != settled).sum()) / 2
            if moved < 1:
                break
            share = moved / max(1, int(keep.sum()))
            growth = 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
            rho, settled = rho * growth, keep
            # The dual is kept, so that in units of rho it shrinks.
            z = torch.where(keep, z, z / growth)
            inverse = (vectors / (values + rho)) @ vectors.T
    return (z / scale).masked_fill_(~keep, 0), keep


def _largest(z: torch.Tensor, sparsity: Sparsity, per_row: bool, heights: Sequence[int]) -> torch.Tensor:
    """bool mask of the largest entries of each matrix, or of each row or group."""
    scores = z.abs()
    if (m := sparsity.of) is not None:
        groups = scores.view(-1, m).T
        return keep_first(groups, sparsity.kept or 0).T.reshape(z.shape)
    share, columns = sparsity.fraction or 0.0, z.shape[1]
    if per_row:
        return keep_in_rows(scores, columns - int(columns * share))
    return torch.cat([
        keep_above(part.reshape(-1), int(part.numel() * share)).view(part.shape) for part in scores.split(list(heights))
    ])  # fmt: skip
