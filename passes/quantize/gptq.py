"""GPTQ: rounds columns in turn, each compensating the errors before it.

Frantar et al., 2210.17323, from the second moments of a weight's inputs, with three optional additions: a weighted search for
ranges of groups (`clip`), scales of either sign (`signed`), and coordinate descent on the same loss afterwards (`sweeps`).
Derivation and conventions: compress/numerics/gptq.py. The scales of K-quants (q4_k) are searched with the Hessian's diagonal as
the importance of columns, and codes get error feedback inside them. With `sparsity` weights are pruned in the same solve:
SparseGPT chooses the zeros (compress/numerics/sparsegpt.py), and what is kept is rounded towards the outputs of the unpruned
matrix.

With `correct=qronos` (2505.11695) a weight's outputs are compared with those that it had in the model before this pass, so that
it makes up for the errors of the weights before it, too. It takes a second forward, and a second block in memory.
`correct=residual` does so, and has linears whose outputs are added to the residual stream (o_proj, down_proj) also make up for
what the stream has lost before they are added, as far as it is a linear function of what they read: |h + W x - h' - V u|^2 is
least for V = [W E(x u^T) + E((h - h') u^T)] E(u u^T)^-1, which is then rounded as ever. What is made up for is learned from the
calibration tokens, as a regression is, and other texts want more `damping` than these do. KL for 0.01, 0.05, 0.15 and 0.3:
SmolLM2-135M, w3a16g64, 64 x 512 tokens, 0.234, 0.225, 0.210 and 0.214; a model of 8 M, w2a16g32, 64 x 256 tokens, 0.0058,
0.0056 and 0.0057 on such texts for the first three, on sources in Python 0.060, 0.048 and 0.046.

With `feedback=both` (YAQA, 2505.22988) errors of outputs count by what they cost in KL, to second order: a gradient sweep over
the unchanged model sums products of gradients by a weight's outputs, and rows that are rounded later make up for those before
them, as columns do (compress/numerics/output_feedback.py). It adds to either correction: SmolLM2-135M, w3a16g64, 64 x 512 tokens,
correct=residual, KL 0.200 instead of 0.213, and 0.301 instead of 0.324 on texts of another kind.

GPTAQ (2504.02692) lowers the same error as qronos, but hands what a column's inputs have changed by to later columns alone; the
correction here has all columns make up for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.base_passes import Clip, QuantizingPass, pruned, refuse_in_turn, refuse_zeros
from compress.contract.shapes import LinearPass
from compress.contract.tasks import MatrixTask, Solution, Statistic
from compress.errors import Refusal
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.numerics.gptq import Solved
    from compress.numerics.hessian import Hessian, Prepared
    from compress.numerics.qtensor import QTensor
    from compress.spec.scheme import Scheme


class Gptq(QuantizingPass, LinearPass):
    """Rounds weights so that their outputs change little on the calibration tokens."""

    example: ClassVar[str] = "calibrate | quantize.gptq(scheme=w4a16g32)"
    rotates: ClassVar[bool] = True

    order: Literal["activation", "stored"] = Field(
        "activation",
        description="columns with the largest inputs first, with fixed scales; or in stored order, with refitted scales",
    )
    clip: Clip = "mse"
    signed: bool = Field(
        True, description="scales of integers may be negative, so that the extra level of symmetric codes is on the better side"
    )
    sweeps: int = Field(
        1, ge=0, le=100, description="rounds of coordinate descent over codes and scales afterwards; 3 are better but slower"
    )
    damping: float | None = Field(
        None, gt=0, le=1,
        description="added to the Hessian's diagonal, as a share of its mean; without it 0.01, and 0.15 with correct=residual",
    )  # fmt: skip
    min_tokens: int = Field(
        32, ge=0, description="matrices with fewer calibration tokens, such as rare experts, are rounded to nearest, and counted"
    )
    correct: Literal["none", "qronos", "residual"] = Field(
        "none",
        description="what outputs are compared with: those for the inputs as they now are, or of the unchanged model (qronos), "
        "where they are added to the residual stream with what it has lost before (residual)",
    )
    feedback: Literal["inputs", "both"] = Field(
        "inputs",
        description="errors are made up for by later columns (inputs), or by later rows, too (both, YAQA), as gradients of the "
        "loss by outputs tell, for which a gradient sweep comes first",
    )
    output_damping: float | None = Field(
        None, gt=0, le=100,
        description="with feedback=both, added to the diagonal of what weighs outputs, as a share of its mean; without it 0.1",
    )  # fmt: skip
    sparsity: Sparsity | None = Field(
        None, description="prune by the same Hessian, as prune.sparsegpt does: a share of zeros, e.g. 0.5, or n:m, e.g. 2:4"
    )

    @model_validator(mode="after")
    def _zeros_or_outliers(self) -> Self:
        if self.sparsity is not None and self.outliers:
            raise ValueError("outliers: not with sparsity, which has no outliers beside codes")
        if self.sparsity is not None and self.scheme.hadamard:
            raise ValueError(f"sparsity: not with {self.scheme}, which mixes zeros with what is kept")
        if self.outliers and self.correct != "none":
            raise ValueError(f"outliers: not with correct={self.correct}, for they stay the numbers that they were")
        if self.weighs_outputs() and (self.sparsity is not None or self.outliers):
            raise ValueError("feedback: not both with sparsity or outliers, which are chosen for all rows before any is rounded")
        if self.output_damping is not None and not self.weighs_outputs():
            raise ValueError("output_damping: only with feedback=both")
        return self

    def becomes(self, weight: Weight, state: State) -> State:
        after = super().becomes(weight, state)
        if after.scheme is not None and after.scheme.scales == "k" and weight.transposed and weight.experts is None:
            reason = f"groups of a Conv1D run along its outputs, where this pass fits no super-blocks of {after.scheme}"
            raise Refusal(reason, "use quantize.rtn for it")
        if self.weighs_outputs():
            refuse_in_turn(weight, after)
        if self.sparsity is None:
            return after
        refuse_zeros(self.scheme)
        if self.scheme.scales in ("tensor", "e4m3"):
            reason = f"{self.scheme} has a scale for all of what readers fuse, which is measured before anything is pruned"
            raise Refusal(reason, "use a scheme with scales of rows, or prune.sparsegpt first")
        return replace(after, sparsity=pruned(weight, state, self.sparsity).sparsity)

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.hessian import Hessian, PairedHessian

        return PairedHessian(width) if self.two_streams() else Hessian(width)

    def statistic_bytes(self, width: int) -> int:
        # fp64 sums and the fp32 mean; then the mean and while it is factored two more. For pairs their sums, and the correction.
        # Where outputs are added to the residual stream they have no more rows than columns, almost everywhere.
        return (12 + (36 if self.two_streams() else 0) + (24 if self.corrects_residual() else 0)) * width * width

    def two_streams(self) -> bool:
        return self.correct != "none"

    def corrects_residual(self) -> bool:
        return self.correct == "residual"

    def weighs_outputs(self) -> bool:
        return self.feedback == "both"

    def prepare(self, statistic: Hessian) -> Prepared:
        from compress.numerics.hessian import prepare

        order: Any = "activation" if self.order == "activation" else "none"
        # With the identity as Hessian this is rounding to nearest.
        return prepare(
            statistic, self._damping(), order, self.min_tokens, "rounded to nearest", self._together, self.scheme.hadamard
        )

    def _damping(self) -> float:
        return self.damping or (0.15 if self.corrects_residual() else 0.01)

    @property
    def _together(self) -> int:
        """Columns that are solved one after the other: those of a group of n:m."""
        return 1 if self.sparsity is None else self.sparsity.of or 1

    def solve(self, tasks: Sequence[MatrixTask], prepared: Prepared) -> list[Solution]:
        stacks: dict[Any, list[MatrixTask]] = {}
        for number, task in enumerate(tasks):
            # Scales of a Conv1D run along its outputs, and some schemes share scales among rows: these cannot be stacked.
            shared = task.after.scheme is not None and task.after.scheme.scales in ("tensor", "block", "e4m3")
            alone = number if shared or _along(task) == "outputs" or task.grams is not None else None
            stacks.setdefault((task.after, task.value.dtype, alone), []).append(task)
        found = {id(task): solution for stack in stacks.values() for task, solution in self._stack(stack, prepared)}
        return [found[id(task)] for task in tasks]

    def _stack(self, tasks: list[MatrixTask], prepared: Prepared) -> Iterator[tuple[MatrixTask, Solution]]:
        """Solutions of tasks with one scheme and dtype, whose rows are rounded together."""
        import torch

        from compress.numerics.gptq import solve
        from compress.numerics.gptq_task import Settings
        from compress.numerics.hessian import errors
        from compress.numerics.input_rotation import rotated
        from compress.numerics.outliers import split
        from compress.numerics.qtensor import along_inputs
        from compress.numerics.refit import refit
        from compress.numerics.sparsegpt import prune

        scheme, dtype = tasks[0].after.scheme, tasks[0].value.dtype
        assert scheme is not None
        w = rotated(torch.cat([task.value for task in tasks]).float(), scheme.hadamard)
        w = prepared.target(w)
        mask = torch.cat([task.value for task in tasks]) != 0 if tasks[0].after.sparsity is not None else None
        rest, kept = w, []
        if self.sparsity is not None:
            # Codes for the best that the mask allows: their squared errors on the outputs and its own add up.
            rest, mask = prune(w, prepared.factor, self.sparsity, heights=[len(task.value) for task in tasks])
            rest = refit(w, rest, mask, prepared.hessian, prepared.factor.damping)
        if (outliers := tasks[0].after.outliers) is not None:
            # In place of an outlier the rest is zero, and so must be its code, so that nothing is lost there.
            splits = [split(along_inputs(task.weight, task.value), outliers) for task in tasks]
            kept = [part.sparse for part in splits]
            out = torch.cat([along_inputs(task.weight, part.mask) for task, part in zip(tasks, splits, strict=True)])
            rest, mask = w.masked_fill(out, 0), ~out if mask is None else mask & ~out
        settings = Settings(self.clip, self.signed, self.least_zero, self.sweeps, along=_along(tasks[0]))
        peak = tasks[0].weight.peak

        def each(part: torch.Tensor, rows: slice = slice(None)) -> Solved:
            zeros = None if mask is None else mask[rows]
            return solve(part, prepared.factor, prepared.hessian, scheme, dtype, settings, mask=zeros, peak=peak)

        if (grams := tasks[0].grams) is None:
            found = each(rest)
        else:
            damping = self.output_damping or 0.1
            found = _rows_in_turn(rest, grams, damping, each, scheme, prepared.hessian)
        note = prepared.note
        if note is None and self.weighs_outputs() and grams is None:
            note = "by inputs alone", "gradients by the outputs of routed experts are not measured"
        norms = ((w @ prepared.hessian) * w).sum(1) if kept else found.norms
        start = 0
        for number, task in enumerate(tasks):
            rows = slice(start, start + len(task.value))
            own = rows if len(tasks) > 1 else slice(None)
            q = _quantized(found, scheme, own)
            q = replace(q, outliers=kept[number]) if kept else q
            weights = float(found.errors[rows].sum()), float(w[rows].square().sum())
            if prepared.correction is not None:
                lost = along_inputs(task.weight, q.dequantize()) - task.value.float()
                weights = float(lost.square().sum()), float(task.value.float().square().sum())
            outputs = float(found.losses[rows].sum()), float(norms[rows].sum())
            if self.sparsity is not None:
                meant = along_inputs(task.weight, q.dequantize())
                yield task, Solution(q, *errors(task.value, meant, prepared.hessian), note)
            else:
                yield task, Solution(q, *weights, *outputs, note)
            start = rows.stop

    def workspace_bytes(self, weight: Weight) -> int:
        # fp32 weights, errors, what codes mean, and a product; before that, what pruning takes.
        return (16 if self.sparsity is None else 40) * weight.out_features * weight.in_features


def _quantized(found: Solved, scheme: Scheme, rows: slice) -> QTensor:
    """Some rows of a solution."""
    from compress.numerics.qtensor import integers

    if found.levels is not None:
        return found.levels.of(scheme, found.codes[rows], rows)
    q = integers(scheme, found.codes[rows], found.scale[rows], None if found.zero is None else found.zero[rows])
    return replace(q, tensor_scale=found.tensor_scale)


def _rows_in_turn(
    w: torch.Tensor, grams: Sequence[torch.Tensor], damping: float, solve: Callable[[torch.Tensor, slice], Solved],
    scheme: Scheme, hessian: torch.Tensor,
) -> Solved:  # fmt: skip
    """Rounds rows in turn, each making up for the errors of those before it; errors are told of W itself."""
    import torch

    from compress.numerics.gptq import Solved
    from compress.numerics.hessian import energies
    from compress.numerics.output_feedback import round_in_turn

    parts: list[Solved] = []
    d = torch.empty_like(w)

    def rounded(aim: torch.Tensor, rows: slice) -> torch.Tensor:
        parts.append(solve(aim, rows))
        q = _quantized(parts[-1], scheme, slice(None)).values()
        d[rows] = w[rows] - q
        return q

    round_in_turn(w, grams, damping, rounded)
    codes, scale = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale"))
    zero = None if parts[0].zero is None else torch.cat([part.zero for part in parts if part.zero is not None])
    losses, norms = energies(d.T, hessian), energies(w.T, hessian)
    identity = sum(part.identity for part in parts)
    return Solved(codes, scale, zero, losses, norms, d.square().sum(1), identity, parts[0].tensor_scale)


def _along(task: MatrixTask) -> Literal["inputs", "outputs"]:
    """The direction in which the groups of a matrix run."""
    return "outputs" if task.weight.transposed and task.weight.experts is None else "inputs"
