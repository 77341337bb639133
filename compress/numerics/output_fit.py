"""Output fit: the least-squares matrix on some of its inputs, and a norm's scale.

Legend: W [out, in]; C [in, in] mean of x x^T over tokens; K the inputs that are left. W' = argmin |W x - W' x_K|^2 has the normal
equations W' C[K, K] = W C[:, K], so W' = W D with D = C[:, K] C[K, K]^-1, which is the same for all that read x. The damping
lambda is a share of C's mean diagonal, as in GPTQ.
"""

from __future__ import annotations

import torch

DAMP = 1e-4
_CHUNK = 1 << 22
"""Entries of a matrix that are fitted at a time."""


class OutputFit:
    """Fits matrices that read the same activations, of which `kept` are left. Raises ValueError for inputs not finite."""

    def __init__(self, c: torch.Tensor, kept: torch.Tensor, damp: float = DAMP) -> None:
        if not bool(torch.isfinite(c).all()):
            raise ValueError("an input was not finite")
        self.c, self.kept = c.float(), kept
        cross = c[kept].double()
        inner, scale, ridge = cross[:, kept], float(c.diagonal().double().mean()) or 1.0, damp
        one = torch.eye(len(kept), dtype=inner.dtype, device=c.device)
        while True:
            lower, failed = torch.linalg.cholesky_ex(inner + ridge * scale * one)
            if not int(failed):
                break
            ridge *= 4
        self.d = torch.cholesky_solve(cross, lower).T.float()

    def __call__(self, w: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """(W' [out, kept] in the dtype of W, relative error of outputs without a fit, and with it)."""
        parts, whole, before, after = [], 0.0, 0.0, 0.0
        for rows in w.split(max(1, _CHUNK // w.shape[1])):
            values = rows.float()
            new = values @ self.d
            whole += self._energy(values)
            before += self._energy(values.index_fill(1, self.kept, 0))
            after += self._energy(values.index_add(1, self.kept, -new))
            parts.append(new.to(w.dtype))
        before, after = ((lost / whole) ** 0.5 if whole > 0 else 0.0 for lost in (before, after))
        # The damping may cost more than the fit gains where all inputs of weight are kept anyway.
        return (torch.cat(parts), before, after) if after <= before else (w[:, self.kept], before, before)

    def _energy(self, w: torch.Tensor) -> float:
        """tr(W C W^T), the mean of |W x|^2."""
        return max(0.0, float(((w @ self.c) * w).sum(dtype=torch.float64)))


class NormScale:
    """The mean, over tokens, of the spread of the kept channels over that of all; additive over processes.

    A norm divides by it. With y = x / s(x), the scale r that is best by least squares, argmin sum_t |r y_K(x_K) - y(x)_K|^2,
    is the mean of s(x_K) / s(x). `centred` norms (LayerNorm) divide by the deviation from the mean, others by the root mean
    square.
    """

    def __init__(self, kept: torch.Tensor, centred: bool) -> None:
        self.kept, self.centred = kept, centred
        self.sums = torch.zeros(2, dtype=torch.float64, device=kept.device)

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs [tokens, width]."""
        x = x.float()
        spread = self._spread(x)
        ratio = torch.where(spread > 0, self._spread(x[:, self.kept]) / spread, 1)
        self.sums += torch.stack([ratio.sum(dtype=torch.float64), ratio.new_tensor(len(ratio), dtype=torch.float64)])

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        return x.std(1, correction=0) if self.centred else x.square().mean(1).sqrt()

    def mean(self) -> float:
        """r; 1 without tokens. Raises ValueError if an input was not finite."""
        found = float(self.sums[0] / self.sums[1]) if self.sums[1] else 1.0
        if not 0 <= found < float("inf"):
            raise ValueError("an input was not finite")
        return found
