"""Learns which layers, channels, heads, neurons and experts to keep.

Sheared LLaMA (Xia et al., 2310.06694): hard-concrete masks on every part, a constraint that pulls each kind to the wanted size,
and the loss of a language model; masks and weights are trained together. In the end exactly the wanted sizes are cut out, with
the masks folded in: a smaller model of the same family, to be trained on by train.lm or distilled.

The target is a shape (sizes, or one that is known by name), a number of parameters, or of bytes; `plan` says the sizes that
follow from it. Key-value heads go with all of their query heads. compress/layerwise/masked_model.py says what differs from
the paper's code, and compress/numerics/hard_concrete.py why masks may close further here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.contract.base_passes import TrainingPass
from compress.contract.slicing_options import TargetOptions, WidthOptions
from compress.contract.slicing_pass import Observed, SlicingPass, Structure
from compress.errors import Refusal
from compress.spec.kept import Kept, Sizes
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.contract.objective import Models, Objective

_SHAPES = {"sheared-370m": (24, 1024, 8, 2816), "sheared-1.3b": (24, 2048, 16, 5504), "sheared-2.7b": (32, 2560, 20, 6912)}
"""Layers, hidden channels, heads and neurons of the paper's models."""
_EVEN = {"layers": 0.5, "hidden": 0.5, "groups": 0.5, "units": 0.5, "experts": 0.5}


class Sheared(TrainingPass, WidthOptions, TargetOptions):
    """Learns what to keep of a model, and cuts it out."""

    example: ClassVar[str] = "calibrate | prune.sheared(layers=1, ffn=64, batch=4, micro_batch=2)"

    layers: int | None = Field(None, ge=1, description="layers that are kept")
    experts: int | None = Field(None, ge=1, description="routed experts that are kept in each layer")
    shape: Literal["", "sheared-370m", "sheared-1.3b", "sheared-2.7b"] = Field("", description="instead of sizes: a known shape")
    mask_lr: float = Field(1.0, gt=0, description="peak learning rate of masks")
    multiplier_lr: float = Field(1.0, gt=0, description="peak learning rate of the constraints' multipliers")
    sparsity_warmup: float = Field(0.2, ge=0, lt=1, description="share of the steps over which the constraints rise")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        sizes = self.asked() or bool(self.layers or self.experts)
        if sum((sizes, bool(self.shape), bool(self.parameters), bool(self.size))) != 1:
            raise ValueError("give sizes such as layers, hidden, kv_heads or ffn; or shape; or parameters; or size")
        if self.expert_ffn or self.shared_ffn:
            raise ValueError("expert_ffn, shared_ffn: no mask is learned for them; use prune.width")
        return self

    def resized(self, structure: Structure) -> Sizes:
        before = structure.sizes
        if self.parameters or self.size:
            return self.fitting(structure, {name: share for name, share in _EVEN.items() if getattr(before, name)})
        if self.shape:
            layers, hidden, heads, units = _SHAPES[self.shape]
            if heads % before.share:
                raise Refusal(f"{heads} heads, of which {before.share} go with each key-value head", "choose another target")
            after = replace(before, layers=layers, hidden=hidden, queries=heads, groups=heads // before.share, units=units)
        else:
            after = self.widths(before)
            after = replace(after, layers=self.layers or after.layers, experts=self.experts or after.experts)
        if after.share != before.share:
            reason = f"{after.queries} heads for {after.groups} key-value heads: here each of these goes with its {before.share}"
            raise Refusal(reason, "give kv_heads, or use prune.width")
        if after == before:
            raise Refusal("a target as large as the model", "give smaller sizes")
        return after

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        return SlicingPass.chosen(self, weights)

    def becomes(self, weight: Weight, state: State) -> State:
        return SlicingPass.becomes(self, weight, state)

    def trained(self, weights: Sequence[Weight]) -> list[Weight]:
        return TrainingPass.chosen(self, weights)

    def keep(self, observed: Observed, before: Sizes, after: Sizes) -> Kept:
        raise AssertionError("masks decide what is kept")

    def objective(self, models: Models) -> Objective:
        from compress.architecture.sizes import sizes_of
        from compress.architecture.weight_map import resolve
        from compress.executors.train.mask_objective import MaskObjective, MaskOptions

        before, model = sizes_of(models.source), resolve(models.source, allow_dtype_mismatch=True)
        weights = tuple(weight for weight in model.weights if weight.module)
        after = self.resized(Structure(model.family, weights, before))
        return MaskObjective(models, before, after, MaskOptions(self.mask_lr, self.multiplier_lr, self.sparsity_warmup))
