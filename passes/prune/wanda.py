"""Zeroes the weights with the smallest |w_ij| |x_j|, magnitude times input norm.

Wanda (Sun et al., 2306.11695): the score of a weight is its magnitude times the root mean square of its input over the
calibration tokens; the lowest are set to zero, in each output's row by default, and the others do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.contract.base_passes import PruningPass
from compress.contract.shapes import LinearPass
from compress.contract.tasks import MatrixTask, Solution, Statistic
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    import torch


class Wanda(PruningPass, LinearPass):
    """Keeps the entries of largest magnitude times input norm."""

    example: ClassVar[str] = "calibrate | prune.wanda(sparsity=2:4)"

    scope: Literal["matrix", "row"] = Field("row", description="a share is taken of the whole matrix, or of each output's row")

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.norms import InputNorms

        return InputNorms(width)

    def statistic_bytes(self, width: int) -> int:
        return 8 * width

    def prepare(self, statistic: Any) -> torch.Tensor | None:
        """Root mean square of each input; None for an expert that no token was sent to."""
        return statistic.rms() if statistic.tokens else None

    def solve(self, tasks: Sequence[MatrixTask], prepared: torch.Tensor | None) -> list[Solution]:
        from compress.numerics.masks import keep_best

        note = ("unrouted", "no calibration token: pruned by magnitude") if prepared is None else None
        solutions = []
        for task in tasks:
            magnitudes = task.value.float().abs()
            scores = magnitudes if prepared is None else magnitudes * prepared
            keep = keep_best(scores, self.sparsity, per_row=self.scope == "row")
            # Cross terms of inputs are not known here, so the outputs' error assumes uncorrelated inputs.
            lost, norm, out_lost, out_norm = (
                float(values.square().sum()) for values in (magnitudes * ~keep, magnitudes, scores * ~keep, scores)
            )
            solutions.append(Solution(task.value.masked_fill(~keep, 0), lost, norm, out_lost, out_norm, note))
        return solutions

    def workspace_bytes(self, weight: Weight) -> int:
        return 14 * weight.out_features * weight.in_features  # magnitudes, scores, products, masks, the result
