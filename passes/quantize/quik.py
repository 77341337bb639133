"""QUIK: 4-bit weights and activations; inputs with outliers keep more bits.

Ashkboos et al., 2310.09259. The inputs of each layer with the largest magnitudes on the calibration tokens, 6.25 % of them (256
of 4,096), keep 8 or 16 bits, and so do their columns of the weight. All others are rounded to int4 per token, with a zero point,
and the weight's columns by GPTQ: the kept columns come last in its order and are not rounded, so that they take up the errors of
all others. Ranges of weights are found by a linear search. Down projections, whose inputs are products with far larger outliers,
get 8 bits.

The state of a weight says it: `codes(w4a4-aasym)+columns(256)`, or `columns(256-int8)`. `eval` and all else that runs the model
here rounds its inputs in the same way. No other reader has such weights; pack(format=native) holds them, and on a CPU they are
multiplied as whole numbers. Derivation: compress/numerics/columns.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.base_passes import Clip, CodeOptions, SchemeOption
from compress.contract.shapes import LinearPass
from compress.contract.tasks import MatrixTask, Solution, Statistic
from compress.errors import Refusal
from compress.spec import selectors
from compress.spec.corrections import Columns
from compress.spec.scheme import Scheme
from compress.spec.weight_state import Note, State, Weight, counted

if TYPE_CHECKING:
    from compress.numerics.columns import PeakedHessian, Split


class Quik(CodeOptions, SchemeOption, LinearPass):
    """Rounds weights and activations to 4 bits, but for inputs with outliers."""

    example: ClassVar[str] = "calibrate | quantize.quik"

    scheme: Scheme = Field(Scheme.parse("w4a4-aasym"), description="what codes and rounded inputs mean")
    down: Scheme = Field(
        Scheme.parse("w8a8"), description="the same for down projections, linears of an MLP with more inputs than outputs"
    )
    outliers: float = Field(
        0.0625, ge=0, description="inputs that are kept: a share, or from 1 on a number; the next multiple of 16 is taken"
    )
    kept: Literal["float", "int8"] = Field(
        "float",
        description="how they and their columns are kept: in the weight's dtype, or as int8 with a scale per token and row",
    )
    order: Literal["activation", "stored"] = Field(
        "activation", description="columns with the largest inputs first, or as stored"
    )
    clip: Clip = "mse"
    signed: bool = Field(True, description="scales may be negative, so that the extra level of codes is on the better side")
    sweeps: int = Field(1, ge=0, le=100, description="rounds of coordinate descent over codes and scales afterwards")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    min_tokens: int = Field(32, ge=0, description="matrices with fewer calibration tokens are rounded to nearest, and counted")

    @model_validator(mode="after")
    def _integers(self) -> Self:
        for name in ("scheme", "down"):
            scheme: Scheme = getattr(self, name)
            if not (scheme.integer and scheme.symmetric and scheme.inputs.startswith("int")):
                raise ValueError(f"{name}: symmetric integers with integer activations such as w4a4-aasym or w8a8, not {scheme}")
        if self.least_zero:
            raise ValueError("least_zero: codes are symmetric, and have no zero points")
        return self

    def becomes(self, weight: Weight, state: State) -> State:
        after = self.coded(weight, state, self.down if is_down(weight) else self.scheme, 0.0)
        if state.sparsity is not None:
            raise Refusal(f"it is {state}, and what kept columns take up would fill zeros", "skip it, or do not prune")
        if weight.transposed:
            raise Refusal("rows of a Conv1D are its inputs, of which no columns can be kept", "use quantize.gptq for it")
        count = Columns.count_of(self.outliers, weight.in_features)
        if count >= weight.in_features:
            raise Refusal(f"{count} kept columns leave none of {weight.in_features} to round", "lower outliers, or skip it")
        return replace(after, columns=Columns(count, self.kept == "int8") if count else None)

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        down, changed = {}, {}
        for weight in weights:
            asked, scheme = self.down if is_down(weight) else self.scheme, states[weight.name].scheme
            if asked != self.scheme:
                down[weight.name] = f"a down projection: {states[weight.name]} instead of {self.scheme}"
            if scheme != asked:
                changed[weight.name] = f"{weight.columns} columns, {asked} became {scheme}"
        return [*counted("down", down), *counted("ragged", changed)]

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.columns import PeakedHessian

        return PeakedHessian(width)

    def statistic_bytes(self, width: int) -> int:
        # fp64 sums and the fp32 mean; then the mean, its factor, the same without kept columns, and its fp64 self in between.
        return 36 * width * width

    def prepare(self, statistic: PeakedHessian) -> Split:
        from compress.numerics.columns import split

        order: Any = "activation" if self.order == "activation" else "none"
        return split(statistic, Columns.count_of(self.outliers, len(statistic.matrix)), self.damping, order, self.min_tokens)

    def solve(self, tasks: Sequence[MatrixTask], prepared: Split) -> list[Solution]:
        return [self._solved(task, prepared) for task in tasks]

    def _solved(self, task: MatrixTask, prepared: Split) -> Solution:
        from compress.numerics.columns import kept_columns
        from compress.numerics.gptq import solve
        from compress.numerics.gptq_task import Settings
        from compress.numerics.hessian import errors
        from compress.numerics.qtensor import integers

        scheme, columns, w = task.after.scheme, task.after.columns, task.value.float()
        assert scheme is not None
        settings = Settings(self.clip, self.signed, 0, self.sweeps)
        found = solve(w, prepared.factor, prepared.rest, scheme, task.value.dtype, settings)
        q = integers(scheme, found.codes, found.scale, found.zero)
        if columns is not None:
            lost = w - q.dequantize()
            best = w[:, prepared.kept] + lost @ prepared.carry
            q = replace(q, kept=kept_columns(best, prepared.kept, task.value.dtype, columns.int8))
        return Solution(q, *errors(task.value, q.dequantize(), prepared.hessian), prepared.note)

    def workspace_bytes(self, weight: Weight) -> int:
        # fp32 weights, errors, what codes mean, and a product.
        return 16 * weight.out_features * weight.in_features


def is_down(weight: Weight) -> bool:
    """Whether it takes an MLP's wide activations back to the width of the model."""
    return selectors.matches("mlp", weight) and weight.in_features > weight.out_features
