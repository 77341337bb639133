"""Smooth: rescales activations so that weights round well; outputs do not change.

Channels of an activation are divided by numbers where they are written (a norm, the linear before), and the columns of all
weights that read them are multiplied. Large channels then have large weights, which rounding affects less (AWQ, Lin et al.,
2306.00978), or outliers move from activations to weights (SmoothQuant, Xiao et al., 2211.10438).

    awq          mean |x|^r, r = 0, .05, .., .95, by the least error of outputs when the readers are rounded to nearest
                 to the scheme of the next pass; r = 0 changes nothing, so that no layer gets worse on these tokens.
                 Errors are those of each layer's outputs over all tokens (AWQ: of a block's, over a few tokens); for experts
                 over all tokens that reach their router
    smoothquant  max |x|^alpha / max |w|^(1 - alpha)

compress/architecture/families.py lists the activations that can be rescaled; others are counted. Put it before the pass
that quantizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from compress.architecture.families import Space
from compress.contract.base_passes import Clip
from compress.contract.group_size import Ragged, fitting
from compress.contract.smoothing_pass import Matrix, SmoothingPass
from compress.contract.tasks import Statistic
from compress.spec.scheme import Scheme
from compress.spec.weight_state import MATRICES, State, Weight

if TYPE_CHECKING:
    import torch


class Seen(NamedTuple):
    """mean |x| [in] and mean of x x^T [in, in]; or max |x| [in] and nothing."""

    inputs: torch.Tensor
    hessian: torch.Tensor | None


class Smooth(SmoothingPass):
    """Makes weights easier to round, and changes nothing else."""

    example: ClassVar[str] = "calibrate | quantize.smooth(scheme=w4a16g32)"

    method: Literal["awq", "smoothquant"] = Field(
        "awq", description="search for the least error of outputs (awq), or a fixed share of ranges (smoothquant)"
    )
    scheme: Scheme | None = Field(None, description="awq: the scheme of the pass that will quantize, e.g. w4a16g128")
    ragged: Ragged = "refuse"
    clip: Clip = "none"
    steps: int = Field(20, ge=2, le=100, description="awq: how many exponents from 0 to below 1 are tried")
    alpha: float = Field(0.5, ge=0, le=1, description="smoothquant: share of the ranges that goes from activations to weights")

    @model_validator(mode="after")
    def _of_its_method(self) -> Self:
        if self.method == "awq" and self.scheme is None:
            raise ValueError("scheme: the one that will follow, with method=awq")
        others = ("alpha",) if self.method == "awq" else ("scheme", "ragged", "clip", "steps")
        if given := [name for name in others if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"{', '.join(given)}: not with method={self.method}")
        return self

    def becomes(self, weight: Weight, state: State) -> State:
        if weight.kind in MATRICES and self.targeted(weight):
            self._scheme(weight)
        return super().becomes(weight, state)

    def _scheme(self, weight: Weight) -> Scheme | None:
        """The scheme that a weight will be quantized to. Raises Refusal if it cannot be."""
        if self.scheme is None:
            return None
        return fitting(self.scheme, weight, self.ragged)

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.smoothing import Activity, Extents

        return Activity(width) if self.method == "awq" else Extents(width)

    def statistic_bytes(self, width: int) -> int:
        return 12 * width * width if self.method == "awq" else 4 * width

    def prepare(self, statistic: Any) -> Seen:
        if self.method == "smoothquant":
            return Seen(statistic.largest(), None)
        return Seen(statistic.magnitudes(), statistic.mean())

    def balance(self, space: Space, matrices: Iterable[Matrix], prepared: Seen) -> torch.Tensor | None:
        import torch

        from compress.checkpoint.reader import torch_dtype
        from compress.numerics.smoothing import by_activity, by_extents, cost

        if self.method == "smoothquant":
            columns = torch.stack([matrix.value.abs().amax(0) for matrix in matrices]).amax(0)
            inputs, weights = (space.by_head(peaks).amax(1).reshape(-1) for peaks in (prepared.inputs, columns))
            return by_extents(inputs, weights, self.alpha)
        assert prepared.hessian is not None
        magnitudes = space.by_head(prepared.inputs).mean(1).reshape(-1)
        tried = [by_activity(magnitudes, step / self.steps) for step in range(self.steps)]
        costs = [0.0] * len(tried)
        for weight, value in matrices:
            scheme = self._scheme(weight)
            assert scheme is not None
            for number, s in enumerate(tried):
                costs[number] += cost(value, space.spread(s), prepared.hessian, scheme, torch_dtype(weight.dtype), self.clip)
        best = min(range(len(tried)), key=costs.__getitem__)
        return tried[best] if best else None

    def workspace_bytes(self, weight: Weight) -> int:
        return 24 * weight.out_features * weight.in_features if len(weight.shape) > 1 else 0  # fp32: with s, codes, products
