"""Zeroes the weights with the smallest |w_ij| |x_j|, magnitude times input norm.

Wanda (Sun et al., 2306.11695): the score of a weight is its magnitude times the root mean square of its input over the
calibration tokens; the lowest are set to zero, in each output's row by default, and the others do not change, unless `refit`
fits them by least squares to the outputs that the matrix had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.contract.base_passes import PruningPass, RefitOption
from compress.contract.shapes import LinearPass
from compress.contract.tasks import MatrixTask, Solution, Statistic
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    import torch


class Wanda(RefitOption, PruningPass, LinearPass):
    """Keeps the entries of largest magnitude times input norm."""

    example: ClassVar[str] = "calibrate | prune.wanda(sparsity=2:4)"

    scope: Literal["matrix", "row"] = Field("row", description="a share is taken of the whole matrix, or of each output's row")

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.hessian import Hessian
        from compress.numerics.norms import InputNorms

        return Hessian(width) if self.refit else InputNorms(width)

    def statistic_bytes(self, width: int) -> int:
        return 12 * width * width if self.refit else 8 * width

    def prepare(self, statistic: Any) -> torch.Tensor | None:
        """Root mean square of each input, or for a refit the Hessian; None for an expert that no token was sent to."""
        from compress.numerics.hessian import finite
        from compress.numerics.refit import LEAST_TOKENS

        if not statistic.tokens:
            return None
        if not self.refit:
            rms: torch.Tensor = statistic.rms()
            return rms
        few, hessian = statistic.tokens < LEAST_TOKENS, finite(statistic.mean())
        return hessian.diagonal().sqrt() if few else hessian

    def solve(self, tasks: Sequence[MatrixTask], prepared: torch.Tensor | None) -> list[Solution]:
        from compress.numerics.hessian import errors
        from compress.numerics.masks import keep_best, zeroed
        from compress.numerics.refit import DAMPING, LEAST_TOKENS, refit

        hessian = prepared if prepared is not None and prepared.dim() == 2 else None
        rms = prepared if hessian is None else hessian.diagonal().sqrt()
        note = None
        if rms is None:
            note = "unrouted", "no calibration token: pruned by magnitude"
        elif self.refit and hessian is None:
            note = "fallback", f"fewer than {LEAST_TOKENS} calibration tokens: not refitted"
        solutions = []
        for task in tasks:
            magnitudes = task.value.float().abs()
            scores = magnitudes if rms is None else magnitudes * rms
            assert task.after.sparsity is not None
            keep = keep_best(scores, task.after.sparsity, per_row=self.scope == "row")
            pruned = zeroed(task.value, keep)
            if hessian is not None:
                pruned = refit(task.value, pruned, keep, hessian, DAMPING) + 0
                solutions.append(Solution(pruned, *errors(task.value, pruned, hessian), note))
                continue
            # Cross terms of inputs are not known here, so the outputs' error assumes uncorrelated inputs.
            lost, norm, out_lost, out_norm = (
                float(values.square().sum()) for values in (magnitudes * ~keep, magnitudes, scores * ~keep, scores)
            )
            solutions.append(Solution(pruned, lost, norm, out_lost, out_norm, note))
        return solutions

    def workspace_bytes(self, weight: Weight) -> int:
        # Magnitudes, scores, products, masks, the result; a refit has five arrays in fp32 instead of the products.
        return (32 if self.refit else 14) * weight.out_features * weight.in_features
