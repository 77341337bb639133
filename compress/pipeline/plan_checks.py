"""Plan checks: refusals that depend on the format or on the model's structure."""

from __future__ import annotations

from collections.abc import Sequence

from compress.architecture.weight_map import Model
from compress.contract.base_passes import QuantizingPass
from compress.contract.format import Format
from compress.contract.pass_base import Pass
from compress.errors import RecipeError, Refusal
from compress.spec.recipe import Recipe
from compress.spec.weight_state import Weight


def refuse_zeros(fmt: Format, recipe: Recipe, passes: Sequence[Pass]) -> None:
    """Raises RecipeError if a quantizer may choose zero points that the format cannot store."""
    for line, own in zip(recipe.lines, passes, strict=False):
        pass_ = own.worker()
        if isinstance(pass_, QuantizingPass) and pass_.scheme.zeros and pass_.least_zero < fmt.least_zero:
            where = f"{line.where or own.pass_name()}: {own.pass_name()}.least_zero"
            expected = f"{fmt.least_zero}, the smallest zero point that {fmt.name} can say"
            raise RecipeError(
                where, expected, str(pass_.least_zero), f"set least_zero={fmt.least_zero}, or pack in another format"
            )


def refuse_unread(weight: Weight, model: Model, pass_: Pass) -> None:
    """Raises Refusal for a weight whose inputs cannot be observed in a sweep over the blocks."""
    if weight.stack.startswith("tower:"):
        raise Refusal(f"calibration feeds the text blocks, not {weight.stack}", "skip it, or use a pass without data")
    if weight.block is None:
        raise Refusal(f"no sweep over the blocks sees what a {weight.kind} outside of them reads", "use a pass without data")
    if weight.module in model.unwatched:
        raise Refusal("its family computes experts where their inputs cannot be watched", "skip them, or use a pass without data")
    if weight.kind == "expert" and weight.attribute == "weight" and getattr(pass_, "route", "router") == "all":
        raise Refusal("its experts are modules by themselves, which see their own tokens only", "leave route=all out")
