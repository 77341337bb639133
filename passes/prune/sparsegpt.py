"""SparseGPT: zeroes entries column by column, kept ones making up for them.

Frantar & Alistarh, 2301.00774, from the second moments of a weight's inputs, with two additions: the columns with the largest
inputs first (`order`), and least squares for what is kept (`refit`), which the paper has not. Derivation and conventions:
compress/numerics/sparsegpt.py. `solver=alps` finds mask and weights together, not greedily (Meng et al., 2406.07831;
compress/numerics/alps.py). To prune and to quantize by one Hessian: quantize.gptq with `sparsity`.

2:4 on a model of 135 M parameters, KL to the source: Wanda 1.70; SparseGPT as printed (`refit=false`) 0.873, with the refit
0.764 in 1.4 times the seconds, ALPS 0.666 in 4 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.base_passes import PruningPass, RefitOption
from compress.contract.shapes import LinearPass
from compress.contract.tasks import MatrixTask, Solution, Statistic
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    from compress.numerics.hessian import Hessian, Prepared


class Sparsegpt(RefitOption, PruningPass, LinearPass):
    """Zeroes weights so that their outputs change little on the calibration tokens; those that are kept change."""

    example: ClassVar[str] = "calibrate | prune.sparsegpt(sparsity=2:4)"

    solver: Literal["sparsegpt", "alps"] = Field(
        "sparsegpt",
        description="column by column; or ALPS, which looks for mask and weights together: better, and several times as slow",
    )
    refit: bool = Field(True, description="then fit the entries that are kept by least squares on the outputs, row by row")
    block: int = Field(
        128, ge=1, le=65536, description="columns among which a share of zeros is chosen, one block after the other"
    )
    order: Literal["activation", "stored"] = Field(
        "stored", description="columns in stored order, as in the paper; or with the largest inputs first, n:m by whole groups"
    )
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    min_tokens: int = Field(
        32, ge=0, description="matrices with fewer calibration tokens, such as rare experts, are pruned by magnitude, and counted"
    )

    @model_validator(mode="after")
    def _by_columns(self) -> Self:
        if self.solver == "alps" and (given := self.model_fields_set & {"block", "order", "refit"}):
            raise ValueError(f"{', '.join(sorted(given))}: only with solver=sparsegpt; alps refits in any case")
        return self

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.hessian import Hessian

        return Hessian(width)

    def statistic_bytes(self, width: int) -> int:
        return 12 * width * width  # fp64 sums and the fp32 mean; then the mean and while it is factored two more

    def prepare(self, statistic: Hessian) -> Prepared:
        from compress.numerics.hessian import prepare

        order: Any = "activation" if self.order == "activation" else "none"
        # With the identity as Hessian this is magnitude.
        return prepare(statistic, self.damping, order, self.min_tokens, "pruned by magnitude", self.sparsity.of or 1)

    def solve(self, tasks: Sequence[MatrixTask], prepared: Prepared) -> list[Solution]:
        import torch

        from compress.numerics import alps
        from compress.numerics.hessian import errors
        from compress.numerics.refit import refit
        from compress.numerics.sparsegpt import prune

        sparsity = tasks[0].after.sparsity
        assert sparsity is not None
        heights = [len(task.value) for task in tasks]
        w = torch.cat([task.value for task in tasks])
        how: Any = {"per_row": self.scope == "row", "heights": heights}
        # Without inputs to go by only the columns one by one are magnitude.
        starved = prepared.note is not None and prepared.note[0] != "damping"
        if self.solver == "alps" and not starved:
            q, keep = alps.prune(w, prepared.hessian, sparsity, self.damping, **how)
        else:
            q, keep = prune(w, prepared.factor, sparsity, block=self.block, **how)
        q = q.to(w.dtype)
        if self.refit or self.solver == "alps":
            q = refit(w, q, keep, prepared.hessian, self.damping)
        # A kept value may be too small for the dtype: adding zero turns -0 into +0.
        parts = [(task.value, new.to(task.value.dtype) + 0) for task, new in zip(tasks, q.split(heights), strict=True)]
        return [Solution(new, *errors(old, new, prepared.hessian), prepared.note) for old, new in parts]

    def workspace_bytes(self, weight: Weight) -> int:
        return (40 if self.refit or self.solver == "alps" else 24) * weight.out_features * weight.in_features
