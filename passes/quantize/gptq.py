"""GPTQ: rounds columns in turn, each making up for the errors before it.

Frantar et al., 2210.17323, on the second moments of what a weight reads, followed by coordinate descent on the same loss.
Derivation and conventions: compress/algebra/gptq.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from compress.contract import Job, LinearPass, Solution, Statistic
from compress.facts import Weight
from compress.kinds import QuantizingPass

if TYPE_CHECKING:
    import torch

    from compress.algebra.hessian import Factor, Hessian


class Prepared(NamedTuple):
    """The Hessian [in, in] of some inputs, its factor, and over how many tokens it was folded."""

    hessian: torch.Tensor
    factor: Factor
    tokens: int


class Gptq(QuantizingPass, LinearPass):
    """Rounds weights so that their outputs change little on the calibration tokens."""

    order: Literal["stored", "activation"] = Field(
        "stored", description="columns as stored, or by how large their inputs are, largest first (scales are then fixed before)"
    )
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    min_tokens: int = Field(
        32, ge=0, description="an expert that saw fewer calibration tokens is rounded to nearest, and counted"
    )

    def statistic(self, width: int) -> Statistic:
        from compress.algebra.hessian import Hessian

        return Hessian(width)

    def statistic_bytes(self, width: int) -> int:
        return 3 * 4 * width * width  # the sum, and while it is factored two more

    def prepare(self, statistic: Hessian) -> Prepared:
        from compress.algebra.hessian import factor

        tokens = statistic.tokens
        hessian = statistic.mean()
        return Prepared(hessian, factor(hessian, self.damping, "activation" if self.order == "activation" else "none"), tokens)

    def solve(self, jobs: Sequence[Job], prepared: Prepared) -> list[Solution]:
        from compress.algebra.gptq import solve
        from compress.qtensor import QTensor, along_inputs

        hessian, factor, tokens = prepared
        solutions = []
        for job in jobs:
            scheme = job.after.scheme
            assert scheme is not None
            w = job.value.float()
            mask = w != 0 if job.after.sparsity is not None else None
            along: Any = "outputs" if job.weight.transposed and job.weight.experts is None else "inputs"
            found = solve(w, factor, hessian, scheme, job.value.dtype, mask=mask, along=along)
            q = QTensor(scheme, found.codes, found.scale, found.zero)
            dense = along_inputs(job.weight, q.dequantize())
            lost = float((dense - w).square_().sum())
            solutions.append(Solution(q, lost, float(w.square().sum()), found.loss, found.norm))
        return solutions

    def workspace_bytes(self, weight: Weight) -> int:
        return 16 * weight.out_features * weight.in_features
