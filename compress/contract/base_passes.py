"""Base passes: options and refusals shared by quantizers, pruners and trainers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.contract.group_size import Ragged, fitting
from compress.contract.pass_base import ExternalInputs, SparingPass, TargetedPass
from compress.contract.text_passes import TrainingTexts
from compress.errors import Refusal
from compress.spec import selectors as targets
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import BLOCK, Scheme
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import FLOATS, MATRICES, Note, State, Weight, counted

if TYPE_CHECKING:
    from compress.contract.allocator import Allocator
    from compress.contract.training_options import TrainingOptions

Clip = Annotated[
    Literal["none", "mse"], Field(description="range of a group: its largest magnitude, or the one with least squared error")
]


def refuse_no_matrix(weight: Weight) -> None:
    """Raises Refusal for a tensor that is not a matrix of floats whose orientation is known."""
    if weight.unclear:
        raise Refusal(weight.unclear, "skip it by name, which leaves it as it is")
    if weight.kind not in MATRICES:
        raise Refusal(f"a {weight.kind} tensor is not a matrix of weights", "leave it out of targets")
    if weight.dtype not in FLOATS or len(weight.shape) not in (2, 3) or not weight.numel:
        raise Refusal(f"{weight.dtype} {list(weight.shape)} is not a matrix of weights", "skip it by name")


def refuse_inputs(weight: Weight, scheme: Scheme) -> None:
    """Raises Refusal if the scheme rounds activations but this weight's inputs would not be rounded when the model runs."""
    if weight.kind not in ("linear", "head"):
        raise Refusal(f"{scheme} rounds activations, which nothing here does for {weight.kind}s", "use a scheme with a16 for it")
    if weight.converted:
        raise Refusal("transformers fuses or splits it while loading, and what it reads is not rounded", "skip it")
    if scheme.scales == "block" and weight.in_features % BLOCK:
        raise Refusal(f"blocks of {BLOCK} do not divide the {weight.in_features} inputs that {scheme} rounds", "skip it")


def refuse_rotation(weight: Weight, scheme: Scheme) -> None:
    """Raises Refusal if the scheme rotates inputs but nothing would rotate those of this weight when the model runs."""
    where = f"{'an' if weight.kind[0] in 'aeiou' else 'a'} {weight.kind}'s"
    if weight.kind != "linear":
        raise Refusal(f"{scheme} rotates inputs, which nothing here does with {where}", "use a scheme without -h for it")
    if weight.transposed or weight.converted:
        reason = "it is a Conv1D" if weight.transposed else "transformers fuses or splits it while loading"
        raise Refusal(f"{reason}, and what it reads is not rotated", "use a scheme without -h for it")
    if weight.in_features % scheme.hadamard:
        raise Refusal(
            f"blocks of {scheme.hadamard} do not divide the {weight.in_features} inputs that {scheme} rotates", "skip it"
        )


def refuse_in_turn(weight: Weight, after: State) -> None:
    """Raises Refusal if rows cannot be rounded one after the other, as feedback=both does."""
    if after.scheme is not None and after.scheme.scales in ("tensor", "block", "k"):
        raise Refusal(f"{after.scheme} has scales that rows share, which feedback=both rounds in turn", "leave feedback out")
    if weight.transposed and weight.experts is None:
        raise Refusal("groups of a Conv1D run along its outputs, which feedback=both rounds in turn", "leave feedback out")


def refuse_columns(state: State) -> None:
    """Raises Refusal if codes cannot be chosen anew because of what stands beside them."""
    if state.columns is not None:
        raise Refusal(f"it is {state}, whose kept columns have taken up the errors of the codes", "skip it")


def refuse_zeros(scheme: Scheme) -> None:
    """Raises Refusal if zeros of a pruned weight need not stay zeros in this scheme."""
    if scheme.zeroless:
        raise Refusal(
            f"no code of {scheme} need mean zero, so pruned weights would not stay zeros", "use a symmetric scheme or -asym"
        )


class CodeOptions(SparingPass):
    """Options of every pass that makes codes, and the state that they give a weight."""

    ragged: Ragged = "refuse"
    least_zero: int = Field(
        0, ge=0, le=1, description="smallest zero point of asymmetric codes; 1 for the gptq format, which cannot store 0"
    )
    outliers: float = Field(
        0.0, ge=0, lt=1, description="share of a matrix's entries, the largest ones, that are kept unrounded next to the codes"
    )

    rotates: ClassVar[bool] = False
    """Whether it rounds what a weight is where its inputs are rotated, as a scheme with -h asks."""

    def coded(self, weight: Weight, state: State, scheme: Scheme, outliers: float | None = None) -> State:
        """A weight's state in codes of a scheme; `outliers` replaces the option of that name. Raises Refusal."""
        refuse_no_matrix(weight)
        if state.scheme is not None:
            raise Refusal(f"it is already {state}; quantizing twice would round rounded values", "skip it in one of the passes")
        if scheme.inputs:
            refuse_inputs(weight, scheme)
        if scheme.hadamard:
            refuse_rotation(weight, scheme)
            self._refuse_rotated(state, scheme, outliers)
        if state.sparsity is not None:
            refuse_zeros(scheme)
        scheme, share = fitting(scheme, weight, self.ragged), self.outliers if outliers is None else outliers
        if share and scheme.scales in ("tensor", "e4m3"):
            reason = f"{scheme} has a scale for all of what readers fuse, which no outlier can be taken out of"
            raise Refusal(reason, "use a scheme with scales of rows, or no outliers for it")
        return State(scheme, state.sparsity, Outliers(share) if share else None)

    def _refuse_rotated(self, state: State, scheme: Scheme, outliers: float | None) -> None:
        """Raises Refusal for what is chosen in the columns of a weight as it is, which are mixed where its inputs are."""
        if not self.rotates:
            raise Refusal(f"{self.pass_name()} rounds weights as they are, and {scheme} rotates them", "use quantize.gptq or rtn")
        if state.sparsity is not None:
            raise Refusal(f"it is {state}, and {scheme} would mix its zeros with what is kept", "use a scheme without -h")
        if self.outliers if outliers is None else outliers:
            raise Refusal(f"{scheme} mixes outliers with other weights, so that none is left to keep", "leave outliers out")


class SchemeOption(TargetedPass):
    """The option that says what codes mean; a class of its own, so that it stands before the others in help."""

    scheme: Scheme = Field(description="what the codes mean, e.g. w4a16g128, w3a16g64-asym, w8a8, fp8, nf4g64, mxfp4, nvfp4")


class QuantizingPass(CodeOptions, SchemeOption):
    """Quantizes dense or masked weights to codes of one scheme."""

    def becomes(self, weight: Weight, state: State) -> State:
        return self.coded(weight, state, self.scheme)

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        changed = {}
        for weight in weights:
            scheme = states[weight.name].scheme
            if scheme is not None and scheme != self.scheme:
                changed[weight.name] = f"{weight.columns} columns, {self.scheme} became {scheme}"
        return counted("ragged", changed)


class FactoringPass(SparingPass):
    """Adds low-rank factors to codes."""

    rank: int = Field(8, ge=1, description="rank of the factors; less where a matrix has fewer rows or columns")
    ranks: tuple[str, ...] = Field(
        (), description="ranks of some weights, SELECTOR=RANK as in targets, e.g. attention=32; the first that matches counts"
    )
    bpw: float | None = Field(
        None, gt=0, description="instead of rank, the most that factors may take, in bits per weight of the matrix"
    )
    factors: Literal["int8", "bf16"] = Field("bf16", description="dtype of the stored factors; int8 ones cannot be trained")

    @field_validator("ranks", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("ranks")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if re.fullmatch(r"(.+)=[1-9]\d{0,5}", text, re.ASCII) is None:
                raise ValueError(f"SELECTOR=RANK, not '{text}'")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.bpw is not None and self.model_fields_set & {"rank", "ranks"}:
            raise ValueError("either bpw or ranks")
        return self

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        # A selector that matches nothing is an error, as in targets.
        targets.select(weights, [text.rpartition("=")[0] for text in self.ranks])
        return super().chosen(weights)

    def lowrank(self, weight: Weight, state: State) -> Lowrank:
        """The low-rank factors that a weight in this state gets. Raises Refusal."""
        if state.sparsity is not None:
            raise Refusal(f"it is {state}, and factors would fill its zeros", "skip it, or do not prune")
        int8, most = self.factors == "int8", min(weight.rows, weight.columns)
        if self.bpw is None:
            own = (text.rpartition("=") for text in self.ranks)
            return Lowrank(min(most, next((int(n) for s, _, n in own if targets.matches(s, weight)), self.rank)), int8)
        each = (8 if int8 else 16) * (weight.rows + weight.columns) + 32 * int8
        rank = min(most, int(self.bpw * weight.rows * weight.columns / each))
        if not rank:
            least = each / (weight.rows * weight.columns)
            raise Refusal(f"bpw={self.bpw:g} does not pay for one rank, which takes {least:.3g}", "raise bpw, or skip it")
        return Lowrank(rank, int8)

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        short = {}
        for weight in weights:
            lowrank = states[weight.name].lowrank
            if self.bpw is None and lowrank is not None and lowrank.rank == min(weight.rows, weight.columns) < self.rank:
                short[weight.name] = f"a rank of {lowrank.rank}, for it has no more rows or columns"
        return [*super().notes(weights, states), *counted("lowrank", short)]


def pruned(weight: Weight, state: State, sparsity: Sparsity, per_row: bool = False) -> State:
    """The state of a weight with these zeros. Raises Refusal."""
    refuse_no_matrix(weight)
    if state != State():
        raise Refusal(f"it is already {state}", "prune first, and once")
    if sparsity.of is not None and weight.in_features % sparsity.of:
        raise Refusal(f"{sparsity.of} does not divide {weight.in_features} inputs", "skip it, or use a share of zeros")
    if sparsity.fraction is not None:
        rows, columns = weight.out_features, weight.in_features
        kept = (
            rows * (columns - int(columns * sparsity.fraction))
            if per_row
            else rows * columns - int(rows * columns * sparsity.fraction)
        )
        if kept < rows:
            raise Refusal(
                f"{sparsity} of zeros leaves {kept} weights for {rows} outputs, so some would be empty", "keep more, or skip it"
            )
    return State(None, sparsity)


class PruningPass(SparingPass):
    """Sets entries of dense weights to zero."""

    sparsity: Sparsity = Field(description="share of zeros, e.g. 0.5, or how many of each m inputs are kept, e.g. 2:4")
    scope: Literal["matrix", "row"] = Field("matrix", description="a share is taken of the whole matrix, or of each output's row")
    owl: bool = Field(
        False, description="OWL: blocks with more outliers among |w_ij| |x_j| keep a larger share, with the same share over all"
    )
    owl_lambda: float = Field(0.08, gt=0, lt=0.5, description="owl: shares differ by at most twice this among blocks")
    owl_m: float = Field(5.0, gt=1, le=1e6, description="owl: an outlier is this many times the mean of its block, or more")

    @model_validator(mode="after")
    def _densities(self) -> Self:
        if not self.owl:
            if given := self.model_fields_set & {"owl_lambda", "owl_m"}:
                raise ValueError(f"{', '.join(sorted(given))}: only with owl=true")
        elif (share := self.sparsity.fraction) is None:
            raise ValueError(f"owl: with a share of zeros such as 0.7; {self.sparsity} is the same in every block")
        elif 2 * self.owl_lambda >= min(share, 1 - share):
            most = min(share, 1 - share) / 2
            raise ValueError(f"owl_lambda: below {most:.4g}, or a block might keep nothing or all with sparsity={self.sparsity}")
        return self

    def allocator(self) -> Allocator | None:
        from compress.contract.owl import OwlDensities

        return OwlDensities(self) if self.owl else None

    def reads_tokens(self) -> bool:
        return self.owl or super().reads_tokens()

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        own = {"tokens": found.tokens, "dtype": found.dtype} if self.owl else {}
        return own | super().external_inputs(found)

    def becomes(self, weight: Weight, state: State) -> State:
        if self.owl and self.sparsity.fraction:
            pruned(weight, state, Sparsity(fraction=self.sparsity.fraction + 2 * self.owl_lambda), self.scope == "row")
        return pruned(weight, state, self.sparsity, self.scope == "row")


class RefitOption(TargetedPass):
    """The option to solve for what a mask keeps; its solver is numerics/refit.py."""

    refit: bool = Field(False, description="then fit the entries that are kept by least squares on the outputs, row by row")


class LearningPass(TargetedPass):
    """Trains what a weight's state leaves to train: a dense weight, what is between its zeros, scales, low-rank factors."""

    targets: tuple[str, ...] = Field(
        ("all",),
        description="what to train: linear, attention, mlp, experts, embeddings, head, norms, all, re:REGEX or a name",
    )

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        # Selectors such as `all` also match tensors that cannot be trained, or that the model does not load.
        return [w for w in super().chosen(weights) if w.module and w.dtype in FLOATS and not w.unlearned]

    def becomes(self, weight: Weight, state: State) -> State:
        if not self.learns(state):
            raise Refusal(self.unlearnable(state), "skip it")
        return state

    def learns(self, state: State) -> list[str]:
        """What it trains of a weight in this state, in words."""
        return learned_of(state)

    def unlearnable(self, state: State) -> str:
        """Why it trains nothing of a weight in this state."""
        return unlearnable(state)

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        found = {w.name: (" and ".join(self.learns(states[w.name])), states[w.name]) for w in weights}
        trained = {name: f"{learned}, by {self.pass_name()}" for name, (learned, _) in found.items() if learned}
        return [
            *counted("trained", trained),
            *counted("untrained", {name: self.unlearnable(state) for name, (learned, state) in found.items() if not learned}),
        ]


def learned_of(state: State) -> list[str]:
    """What can be trained of a weight in this state, in words."""
    if state.scheme is None:
        return ["weights" if state.sparsity is None else "weights between zeros"]
    scales, factors = not state.scheme.powers, state.lowrank is not None and not state.lowrank.int8
    kind = "scales (minima stay as they are)" if state.scheme.minimum else "scales"
    return [kind] * scales + ["low-rank factors"] * factors


def codes_of(scheme: Scheme) -> list[str]:
    """What is trained where codes are chosen anew, in words."""
    return ["codes", *([] if scheme.powers else ["scales"])]


def unlearnable(state: State) -> str:
    """Why nothing of a weight in codes can be trained."""
    return f"{state.scheme} binds scales to powers of two or to few bits: none can be moved"


class TrainingPass(LearningPass, TrainingTexts):
    """Trains by AdamW: dense weights, the non-zero entries of masked ones, scales of codes, low-rank factors."""

    epochs: int = Field(1, ge=1, description="how often each sample is seen")
    batch: int = Field(16, ge=1, description="samples in an optimizer step, over all processes")
    micro_batch: int = Field(4, ge=1, description="samples in one forward of one process")
    lr: float = Field(1e-4, ge=0, le=1e30, description="peak learning rate of weights")
    scale_lr: float = Field(
        5e-3, ge=0, le=1e30, description="peak learning rate of the scales of codes, as a share of each scale"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the learning rate decays")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    final: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two betas")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, on matrices only")
    clip: float = Field(1.0, ge=0, description="gradients are scaled down to at most this norm; 0 for no limit")
    recompute: bool = Field(False, description="compute blocks again in the backward pass: less memory, a third more work")
    save_every: int = Field(100, ge=1, description="steps between saved training states, from which a killed run resumes")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas are from 0 to below 1")
        if self.loading != "static" and "epochs" in self.model_fields_set:
            raise ValueError(f"epochs: not with loading={self.loading}, which draws as many samples as samples says")
        return self

    def redacted(self) -> Self:
        """Also the teacher's name instead of its path; its content is identified by a digest."""
        named, teacher = super().redacted(), self.teacher_model()
        return named.model_copy(update={"teacher": PurePath(teacher).name}) if teacher else named

    def training_options(self) -> TrainingOptions:
        from compress.contract.training_options import TrainingOptions

        return TrainingOptions(
            self.epochs, self.batch, self.micro_batch, self.lr, self.scale_lr, curve=self.schedule, warmup=self.warmup,
            final=self.final, betas=self.betas, weight_decay=self.weight_decay, clip=self.clip, recompute=self.recompute,
            save_every=self.save_every,
        )  # fmt: skip
