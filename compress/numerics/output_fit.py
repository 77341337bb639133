"""Output fit: the least-squares matrix on some of its inputs.

Legend: W [out, in]; C [in, in] mean of x x^T over tokens; K the inputs that are left. W' = argmin |W x - W' x_K|^2 has the normal
equations W' C[K, K] = W C[:, K]. The damping lambda is a share of C's mean diagonal, as in GPTQ.
"""

from __future__ import annotations

import torch

DAMP = 1e-4


def fitted(w: torch.Tensor, c: torch.Tensor, kept: torch.Tensor, damp: float = DAMP) -> tuple[torch.Tensor, float, float]:
    """(W' [out, kept] fp32, relative error of outputs without a fit, and with it). Raises ValueError for inputs not finite."""
    c, w = c.double(), w.double()
    if not bool(torch.isfinite(c).all()):
        raise ValueError("an input was not finite")
    inner, cross = c[kept][:, kept], c[:, kept]
    scale = float(c.diagonal().mean()) or 1.0
    ridge = damp
    while True:
        lower, failed = torch.linalg.cholesky_ex(inner + ridge * scale * torch.eye(len(kept), dtype=c.dtype, device=c.device))
        if not int(failed):
            break
        ridge *= 4
    new = torch.cholesky_solve((w @ cross).T, lower).T
    norm = _energy(w, c)

    def lost(values: torch.Tensor) -> float:
        rest = w.clone()
        rest[:, kept] -= values
        return (max(_energy(rest, c), 0.0) / norm) ** 0.5 if norm > 0 else 0.0

    before, after = lost(w[:, kept]), lost(new)
    # The damping may cost more than the fit gains where all inputs of weight are kept anyway.
    return (new.float(), before, after) if after <= before else (w[:, kept].float(), before, before)


def _energy(w: torch.Tensor, c: torch.Tensor) -> float:
    """tr(W C W^T), the mean of |W x|^2."""
    return float(((w @ c) * w).sum())
