"""LoftQ: codes and low-rank factors, found in turn, as a start for fine-tuning.

Li et al., 2310.08659, for any scheme and without data: round the weight less the factors' product, then take the best factors
of the rounding error, and repeat. In the paper scales are fitted in every round, and the residual may increase; with
`scales=frozen` they are those of the first round, and it cannot. The best round is kept, not the last. Derivation:
compress/numerics/loftq.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.base_passes import Clip, FactoringPass, QuantizingPass
from compress.contract.shapes import TensorPass
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.qtensor import QTensor


class Loftq(QuantizingPass, FactoringPass, TensorPass):
    """Makes codes and low-rank factors that together are close to the weights."""

    example: ClassVar[str] = "quantize.loftq(scheme=nf4g32, rank=4, iterations=2)"

    rank: int = Field(16, ge=1, description="rank of the factors; less if a matrix has fewer rows or columns")
    iterations: int = Field(5, ge=1, le=1000, description="rounds; one is rounding and the factors of its error")
    scales: Literal["fitted", "frozen"] = Field(
        "fitted", description="scales of later rounds: fitted anew, as in the paper, or frozen, so that no round gets worse"
    )
    keep: Literal["best", "last"] = Field("best", description="which round to keep: the one with the least error, or the last")
    clip: Clip = "none"

    @model_validator(mode="after")
    def _fixed(self) -> Self:
        if self.scales == "frozen" and self.outliers:
            raise ValueError("no outliers with scales=frozen: which entries they are changes with the factors")
        return self

    def becomes(self, weight: Weight, state: State) -> State:
        after = super().becomes(weight, state)
        return replace(after, lowrank=self.lowrank(weight, after))

    def tensor(self, weight: Weight, after: State, value: torch.Tensor | QTensor) -> tuple[torch.Tensor | QTensor, float | None]:
        from compress.numerics.loftq import alternate
        from compress.numerics.qtensor import QTensor
        from compress.numerics.rounding import nearest, stacked

        assert after.scheme is not None
        assert after.lowrank is not None
        assert not isinstance(value, QTensor)
        peak = None if weight.experts is not None else weight.peak
        rounding = partial(
            nearest, scheme=after.scheme, dtype=value.dtype, clip=self.clip, least_zero=self.least_zero, peak=peak,
            outliers=after.outliers,
        )  # fmt: skip
        found, lost = [], 0.0
        for matrix in value if weight.experts is not None else (value,):
            made = alternate(
                matrix, lambda w: rounding(w).q, after.lowrank, self.iterations, self.scales == "frozen", self.keep == "best"
            )
            found.append(made.q)
            lost += min(made.residuals) if self.keep == "best" else made.residuals[-1]
        norm = float(value.double().square().sum())
        return stacked(found) if weight.experts is not None else found[0], (lost / norm) ** 0.5 if norm else 0.0

    def workspace_bytes(self, weight: Weight) -> int:
        # fp32: the matrix, its residual, dequantized codes, their error, the factors' product and the difference; that
        # in fp64, twice; and the workspace of the search for ranges.
        return 48 * weight.rows * weight.columns
