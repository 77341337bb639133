"""LoRC: adds low-rank factors of the rounding error to the codes.

Yao et al., ZeroQuant-V2, 2303.08302: after any quantizer, the best factors of E = W - Q. White rounding noise has nearly
full rank, so at four bits the factors capture little of |E|; they help if E has structure, at two and three bits and with
outliers. With `weighted` they minimise the error of outputs on the calibration tokens instead. W is read from the
checkpoint that the codes were made from. Derivation: compress/numerics/lowrank.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from compress.contract.base_passes import FactoringPass, refuse_no_matrix
from compress.contract.shapes import CompensatingPass, LinearPass
from compress.contract.tasks import MatrixTask, Solution, Statistic
from compress.errors import Refusal
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.hessian import Hessian
    from compress.numerics.qtensor import QTensor


class Prepared(NamedTuple):
    """The Hessian [in, in] of some inputs, its upper triangular root, and a note if it was not solved as asked."""

    hessian: torch.Tensor
    root: torch.Tensor
    note: tuple[str, str] | None


class Lorc(FactoringPass, CompensatingPass, LinearPass):
    """Adds low-rank factors that compensate for rounding errors."""

    example: ClassVar[str] = "quantize.rtn(scheme=w3a16g32) | quantize.lorc(rank=4)"

    factors: Literal["int8", "bf16"] = Field("int8", description="dtype of the stored factors; int8 ones cannot be trained")
    weighted: bool = Field(False, description="minimise errors of outputs on the calibration tokens, not of weights")
    damping: float = Field(0.01, gt=0, le=1, description="with weighted: added to the Hessian's diagonal, as a share of its mean")
    min_tokens: int = Field(
        32, ge=0, description="with weighted: matrices that see fewer calibration tokens are not weighted, and counted"
    )

    @model_validator(mode="after")
    def _read(self) -> Self:
        if not self.weighted and (unread := self.model_fields_set & {"damping", "min_tokens"}):
            raise ValueError(f"{', '.join(sorted(unread))}: only with weighted=true")
        return self

    def observes(self) -> bool:
        return self.weighted

    def becomes(self, weight: Weight, state: State) -> State:
        refuse_no_matrix(weight)
        if state.scheme is None:
            raise Refusal(f"it is {state}: nothing was rounded that could be made up for", "quantize it first, or skip it")
        if state.lowrank is not None:
            raise Refusal(f"it is already {state}", "skip it in one of the passes")
        if state.scheme.hadamard:
            raise Refusal(
                f"{state.scheme} rotates inputs, and nothing here multiplies factors by those", "use a scheme without -h"
            )
        if state.columns is not None:
            raise Refusal(f"it is {state}, and its columns have taken up the errors already", "skip it")
        return replace(state, lowrank=self.lowrank(weight, state))

    def compensate(self, weight: Weight, q: QTensor, after: State, dense: torch.Tensor) -> tuple[QTensor, float]:
        from compress.numerics.lowrank import best, stored
        from compress.numerics.rounding import stacked, unstacked

        assert after.lowrank is not None
        parts, matrices = ([q], [dense]) if weight.experts is None else (unstacked(q), list(dense))
        found, lost = [], 0.0
        for part, matrix in zip(parts, matrices, strict=True):
            error = matrix.float() - part.base()
            found.append(replace(part, lowrank=(made := stored(*best(error, after.lowrank.rank), after.lowrank))))
            lost += float((error - made.product()).double().square().sum())
        norm = float(dense.double().square().sum())
        return found[0] if weight.experts is None else stacked(found), (lost / norm) ** 0.5 if norm else 0.0

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.hessian import Hessian

        return Hessian(width)

    def statistic_bytes(self, width: int) -> int:
        return 16 * width * width  # fp64 sums and the fp32 mean; then the mean, its root and what it takes to find that

    def prepare(self, statistic: Hessian) -> Prepared:
        import torch

        from compress.numerics.hessian import factor

        if statistic.tokens < self.min_tokens:
            # With the identity as Hessian all inputs have equal weight.
            alone = torch.eye(len(statistic.matrix), device=statistic.matrix.device)
            return Prepared(alone, alone, ("fallback", f"fewer than {self.min_tokens} calibration tokens: not weighted"))
        hessian = statistic.mean()
        found = factor(hessian, self.damping)
        raised = ("damping", f"a Hessian that needed more damping than {self.damping:g}")
        return Prepared(hessian, found.feedback * found.pivots.sqrt(), raised if found.damping > self.damping else None)

    def solve(self, tasks: Sequence[MatrixTask], prepared: Prepared) -> list[Solution]:
        from compress.numerics.lowrank import best_for, stored
        from compress.numerics.qtensor import along_inputs

        solutions = []
        for task in tasks:
            assert task.codes is not None
            assert task.after.lowrank is not None
            w, turned = task.value.float(), task.weight.transposed and task.weight.experts is None
            error = w - along_inputs(task.weight, task.codes.base())
            made = stored(*best_for(error, task.after.lowrank.rank, prepared.root), task.after.lowrank)
            left = error - made.product()
            lost, norm = (float(((x @ prepared.hessian) * x).sum()) for x in (left, w))
            q = replace(task.codes, lowrank=made.turned() if turned else made)
            solutions.append(Solution(q, float(left.square().sum()), float(w.square().sum()), lost, norm, prepared.note))
        return solutions

    def workspace_bytes(self, weight: Weight) -> int:
        return 24 * weight.rows * weight.columns  # fp32: the matrix, what codes mean, what is lost, and its decomposition
