"""LLM-MQ: bits where the loss is sensitive, within a budget of bits or bytes.

Li et al., ENLSP 2023: gradients of the language model's loss estimate what rounding a weight to each scheme would cost, and an
exact integer program spends the budget. Gradients, which the paper leaves open, are those of the mean loss over all calibration
tokens, summed in fp32, with unrounded weights. The cost of a scheme is measured by rounding to nearest, with the ranges of
the method that rounds in the end. With g the gradient and D = W - Q(W):

    paper   |sum g D|      the loss to first order. Terms of either sign cancel, near a minimum to noise, so that more
                           bits may cost more
    abs     sum |g D|      the same without cancelling
    fisher  sum F D^2      to second order, with the empirical Fisher matrix of samples as the Hessian's diagonal: F is the
                           sum over samples of the square of each sample's gradient
    kl      tr(G D H D^T) / 2   what the KL to the model grows by, to second order, with the Fisher matrix as a product of
                           Kronecker factors (K-FAC; YAQA, 2505.22988): H of inputs, G of gradients by outputs, of labels
                           that the model predicts itself. D is what GPTQ leaves, so that each scheme is solved for

kl is the default, and abs where a weight is targeted that kl cannot measure: experts, embeddings, a head, Conv1D. abs,
rounded by GPTQ, on a model of 2.6 M parameters at 3 bits had a KL to the source of 0.0142 (paper 0.0258,
3 bits everywhere 0.0192), and 0.0378 at 2.5 (paper 0.0469). Calibrated on encyclopedic text alone, abs and fisher choose alike
there at 3 bits (0.0128, 3 bits everywhere 0.0181), and at 2.5 fisher has 0.0316, abs 0.0311. On a model of 0.26 M in five
blocks nothing beats 3 bits everywhere (0.34; abs 0.38, paper 0.59): there is little to win there, for even costs that were
measured, a group at a time, gained 6 % (rounded to nearest). On one of 135 M `bits=3` loses too (abs 0.390, fisher 0.385, 3
bits everywhere 0.353): abs grows with the error where the loss grows with its square, and neither sees what GPTQ makes up for.
kl does: 0.301 there with `fused=false`, which gives values more bits than queries, and 0.344 where q, k and v share a
scheme; on the embedded model 0.067 and 0.071 (3 bits everywhere 0.079). On models of 8 M and 2.6 M with fused weights, from
64 x 512 tokens of encyclopedic text, it has 0.00148 and 0.0147 at 3 bits where abs has 0.00166 and 0.0164, at 2.5 bits 0.0033
and 0.034 (abs 0.0044 and 0.042). At `bits=2.5` both win on the one of 135 M: kl has 0.63 and abs 0.67 with 2.75 bits stored for
a weight, where a line between 2 bits in groups of 32 (1.07 with 2.5) and 3 bits (0.353 with 3.25) has 0.74.

Patterns of zeros are not among the choices, for there would be nothing to choose: half of the weights with 4 bits and their
places (2:4, w4a16g64) take as many bits as all of them with 3, and leave 1.5 to 1.7 times the error of outputs in the median of
each kind of matrix, and less than those in one of 210 (SmolLM2-135M, both by GPTQ from 16 x 512 tokens).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.contract.allocator import Allocator, Offer, Rest, read_table
from compress.contract.base_passes import Clip, CodeOptions, refuse_in_turn
from compress.contract.discover import load_pass
from compress.contract.fused_groups import together
from compress.contract.pass_base import Pass
from compress.contract.shapes import DelegatingPass, LinearPass
from compress.errors import InputError, Refusal, UsageError
from compress.numerics.qtensor import specs
from compress.spec.byte_size import parse_size
from compress.spec.scheme import Scheme
from compress.spec.weight_state import DENSE, Note, State, Weight, counted

if TYPE_CHECKING:
    import torch

    from compress.numerics.hessian import Hessian, Prepared

_BAND = 1 << 22
"""Elements of a matrix that are processed at a time."""


def _is_measured_by_kl(weight: Weight) -> bool:
    return weight.kind == "linear" and not weight.transposed and weight.block is not None


class LlmMq(CodeOptions, DelegatingPass, Allocator):
    """Gives each weight one of several schemes, by its cost in loss."""

    example: ClassVar[str] = "calibrate | quantize.llm_mq(schemes=[w2a16g32-asym, w4a16g32-asym], bits=3)"

    schemes: tuple[Scheme, ...] = Field(
        tuple(map(Scheme.parse, ("w2a16g128-asym", "w3a16g128-asym", "w4a16g128-asym"))), description="schemes to choose among"
    )
    bits: float | None = Field(None, gt=0, description="budget: mean bits of codes over the targeted weights, as in the paper")
    bpw: float | None = Field(
        None, gt=0, description="budget: mean bits per weight over the whole model, with scales and untargeted weights"
    )
    size: str | None = Field(None, description="budget: the checkpoint's weights and config on disk, e.g. 3.2GB")
    mode: Literal["auto", "paper", "abs", "fisher", "kl"] = Field(
        "auto",
        description="cost of rounding: |sum g D|, sum |g D| or sum F D^2, with gradient g, its squares F and error D of rounding "
        "to nearest; or what the KL grows by (kl), with D of the method itself, which takes longer and tells more; auto is kl, "
        "and abs where a weight is targeted that is no linear inside a block",
    )
    method: Literal["gptq", "rtn"] = Field("gptq", description="the pass that then rounds, with its defaults except clip")
    correct: Literal["none", "qronos", "residual"] = Field("none", description="as of quantize.gptq, once schemes are decided")
    feedback: Literal["inputs", "both"] = Field("inputs", description="as of quantize.gptq, once schemes are decided")
    clip: Clip = "mse"
    outlier_bits: tuple[int, ...] = Field(
        (2,), description="schemes that have outliers, by the bits of their codes; the paper has 0.005 outliers at 2 bits"
    )
    fused: bool = Field(True, description="q, k and v share a scheme, gate and up too: some readers fuse them")
    experts: Literal["model", "block", "own"] = Field(
        "model", description="routed experts that share a scheme: all, as readers require, those of a block, or none"
    )
    reuse: str = Field("", description="an allocation.jsonl to take instead of a budget")

    @field_validator("schemes", "outlier_bits", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int) else value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("bits", "bpw", "size") if getattr(self, name) is not None]
        if len(given) != (0 if self.reuse else 1):
            raise ValueError(f"{'no budget beside reuse' if self.reuse else 'one of bits, bpw and size'}, not {given or 'none'}")
        if self.method != "gptq" and (more := {"correct", "feedback"} & self.model_fields_set):
            raise ValueError(f"{' and '.join(sorted(more))}: only with method=gptq")
        if self.outliers and (self.correct != "none" or self.feedback == "both"):
            raise ValueError("outliers: not with correct or feedback, which move what would stay as it was")
        if not self.schemes or len(set(self.schemes)) < len(self.schemes):
            raise ValueError("schemes that differ")
        if self.size is not None:
            try:
                parse_size(self.size)
            except UsageError as error:
                raise ValueError(f"size: {error.problems[0].expected}") from None
        return self

    def redacted(self) -> Self:
        """The table's name instead of its path: a digest identifies its content, and paths are private."""
        return self.model_copy(update={"reuse": PurePath(self.reuse).name})

    def worker(self) -> Pass:
        # A scheme with zero points, if any has them, because a plan asks this pass whether the format can store them.
        scheme = min(self.schemes, key=lambda scheme: not scheme.zeros)
        options: dict[str, Any] = {"scheme": scheme, "clip": self.clip, "least_zero": self.least_zero}
        if self.method == "gptq":
            options |= {"correct": self.correct, "feedback": self.feedback}
        return load_pass(f"quantize.{self.method}").model_validate(options)

    def allocator(self) -> Allocator:
        return self

    def becomes(self, weight: Weight, state: State) -> State:
        return self.largest(weight, state)

    def offers(self, weight: Weight, state: State) -> tuple[State, ...]:
        if self.mode == "kl" and not self.reuse and not _is_measured_by_kl(weight):
            what = "a Conv1D" if weight.transposed else "an expert" if weight.kind == "expert" else f"a {weight.kind}"
            reason = f"mode=kl measures linears inside blocks, and it is {what}"
            raise Refusal(reason, "use mode=abs or fisher, or leave it out of targets")
        wanted = [(scheme, self.outliers if scheme.bits in self.outlier_bits else 0.0) for scheme in self.schemes]
        if self.reuse:
            found = self.table.get(weight.name, DENSE)
            if found.scheme is None:
                raise Refusal(f"{PurePath(self.reuse).name} has no scheme for it", "skip it")
            wanted = [(found.scheme, found.outliers.share if found.outliers else 0.0)]
        states = tuple(self.coded(weight, state, scheme, share) for scheme, share in wanted)
        for after in states if self.feedback == "both" else ():
            refuse_in_turn(weight, after)
        return states

    def notes(self, weights: Sequence[Weight], states: dict[str, State]) -> list[Note]:
        changed = {}
        for weight in weights:
            if (scheme := states[weight.name].scheme) not in self.schemes:
                changed[weight.name] = f"{weight.columns} columns: {scheme}, which none of schemes is"
        if self.reuse:
            return []
        other = [weight.name for weight in weights if not _is_measured_by_kl(weight)] if self.mode == "auto" else []
        why = "by mode=abs: kl measures linears inside blocks, and these are none"
        return [*counted("ragged", changed), *counted("costs", dict.fromkeys(other, why))]

    def table_digest(self) -> str:
        if not self.reuse:
            return ""
        from compress.checkpoint.scan import file_digest

        return file_digest(Path(self.reuse))

    @cached_property
    def table(self) -> dict[str, State]:
        """The states in the table that is reused."""
        return read_table(Path(self.reuse))

    def known(self, weights: Sequence[Weight]) -> dict[str, State] | None:
        if not self.reuse:
            return None
        if more := sorted(self.table.keys() - {weight.name for weight in weights}):
            do = "reuse it with the targets and skip that it was made with"
            raise InputError(self.reuse, "weights that are targeted", f"'{more[0]}' among {len(more)} that are not", do)
        return self.table

    @property
    def squares(self) -> bool:
        return self.mode == "fisher"

    def weighs_outputs(self, weights: Sequence[Weight]) -> bool:
        return self.mode == "kl" or (self.mode == "auto" and all(map(_is_measured_by_kl, weights)))

    def prepare_inputs(self, statistic: Hessian) -> Prepared:
        from compress.numerics.hessian import prepare

        return prepare(statistic, 0.01, "activation", 1, "rounded to nearest")

    def costs_by_both(
        self, offer: Offer, value: torch.Tensor, inputs: Prepared, outputs: Sequence[torch.Tensor]
    ) -> tuple[float, ...]:
        from compress.numerics.output_feedback import segments

        found = []
        for state in offer.states:
            d = self._left(offer.weight, state, value, inputs)
            felt = d @ inputs.hessian
            parts = zip(segments(len(d)), outputs, strict=True)
            found.append(sum(float(((gram @ d[rows]) * felt[rows]).double().sum()) for rows, gram in parts) / 2)
        return tuple(found)

    @cached_property
    def _rounder(self) -> LinearPass:
        """GPTQ without corrections, by which each scheme is tried."""
        made: Any = self.model_copy(update={"correct": "none", "feedback": "inputs"}).worker()
        return made  # type: ignore[no-any-return]

    def _left(self, weight: Weight, state: State, value: torch.Tensor, inputs: Prepared) -> torch.Tensor:
        """W - Q of a matrix [out, in] in fp32, by the method that rounds in the end, without what changes before it."""
        from compress.contract.tasks import MatrixTask
        from compress.numerics.qtensor import QTensor
        from compress.numerics.rounding import largest, nearest

        assert state.scheme is not None
        if self.method == "rtn":
            q = nearest(
                value, state.scheme, value.dtype, self.clip, self.least_zero, weight.peak or largest(value), state.outliers
            ).q
        else:
            (solution,) = self._rounder.solve([MatrixTask(weight, state, value)], inputs)
            assert isinstance(solution.value, QTensor)
            q = solution.value
        return value.float() - q.dequantize()

    def costs(self, offer: Offer, value: torch.Tensor, gradient: torch.Tensor | None) -> tuple[float, ...]:
        from compress.numerics.fit import meant
        from compress.numerics.outliers import split
        from compress.numerics.rounding import largest, nearest

        assert gradient is not None
        found = [0.0] * len(offer.states)
        columns = value.shape[-1]
        # Whole blocks of 128 rows, which share a scale in some schemes.
        height = max(1, _BAND // (128 * columns)) * 128
        for w, g in zip(value.reshape(-1, *value.shape[-2:]), gradient.reshape(-1, *value.shape[-2:]), strict=True):
            peak = offer.weight.peak or largest(w)
            for number, state in enumerate(offer.states):
                assert state.scheme is not None
                # Outliers cost nothing: in their places the rest and its codes are zero.
                rest = w if state.outliers is None else split(w, state.outliers).rest
                for own, slope in zip(rest.split(height), g.split(height), strict=True):
                    if state.scheme.integer and self.method == "gptq":
                        # The ranges that GPTQ will choose, in a seventh of the time.
                        rounded = meant(own, state.scheme, value.dtype, self.clip, True, self.least_zero)
                    else:
                        rounded = nearest(own, state.scheme, value.dtype, self.clip, self.least_zero, peak).q.dequantize()
                    found[number] += self._felt(slope, rounded.to(value.dtype).float() - own.float())
        return tuple(map(abs, found))

    def _felt(self, slope: torch.Tensor, error: torch.Tensor) -> float:
        """The cost of the mode, a sum over the weights; `slope` are gradients or their squares."""
        felt = slope * (error.square() if self.squares else error)
        return float((felt.abs() if self.mode in ("abs", "auto") else felt).double().sum())

    def decide(self, offers: Sequence[Offer], rest: Rest) -> dict[str, State]:
        from compress.numerics.knapsack import choose

        groups: dict[str, list[Offer]] = defaultdict(list)
        for offer in offers:
            groups[self._group(offer.weight)].append(offer)
        choices = range(len(self.schemes))
        sizes = [[sum(self._taken(o, c) for o in group) for c in choices] for group in groups.values()]
        costs = [[sum(o.costs[c] if o.costs else 0.0 for o in group) for c in choices] for group in groups.values()]
        numel = sum(offer.weight.numel for offer in offers)
        word, given, unit, base = self._budget(numel, rest)
        least = sum(map(min, sizes))
        if least > (room := math.floor(given * unit - base + 1e-6)):
            expected = f"{math.ceil((least + base) / unit * 1e4) / 1e4:,.10g} at least, with the smallest of schemes everywhere"
            do = "raise it, offer smaller schemes, or target more weights"
            raise UsageError(f"{self.pass_name()}.{word}", expected, f"{given:,.10g}", do)
        found = choose(costs, sizes, room)
        return {o.weight.name: o.states[c] for c, group in zip(found, groups.values(), strict=True) for o in group}

    def _budget(self, numel: int, rest: Rest) -> tuple[str, float, float, int]:
        """(the option, its value, units of `_taken` in one of it, units that untargeted weights take anyway)."""
        if self.bits is not None:
            return "bits", self.bits, numel, 0
        if self.bpw is not None:
            return "bpw", self.bpw, (numel + rest.numel) / 8, rest.nbytes
        assert self.size is not None
        return "size", parse_size(self.size), 1, rest.nbytes + rest.overhead_bytes

    def _taken(self, offer: Offer, choice: int) -> int:
        """The share of the budget that a choice takes: bits of codes, or bytes of all parts."""
        state = offer.states[choice]
        assert state.scheme is not None
        if self.bits is not None:
            return offer.weight.numel * state.scheme.bits
        return sum(spec.nbytes for spec in specs(offer.weight, state))

    def _group(self, weight: Weight) -> str:
        """A key that is equal for weights that share a scheme."""
        if weight.kind == "expert" and self.experts != "own":
            return f"experts {weight.stack} {weight.block}" if self.experts == "block" else "experts"
        return together(weight.name) if self.fused else weight.name
