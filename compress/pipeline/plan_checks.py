"""Plan checks: refusals that depend on the format or on the model's structure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from compress.architecture.weight_map import Model
from compress.contract.base_passes import QuantizingPass
from compress.contract.cache_pass import scales_of
from compress.contract.format import Format
from compress.contract.pass_base import Pass, WeightPass
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


def refuse_after_cache(where: str, pass_: WeightPass, weights: Sequence[Weight]) -> None:
    """Raises RecipeError for a pass that would change weights after scales of keys and values were measured."""
    if scales_of(weights) and pass_.target_format() is None and not pass_.unpacks:
        got = "a model that has scales of keys and values, which were measured with its weights as they are"
        do = "move quantize.kv behind it; a finished checkpoint is made again without quantize.kv, from its source or a kept step"
        raise RecipeError(where, "quantize.kv after every pass that changes weights, and once", got, do)


def refuse_cache(fmt: Format, weights: Sequence[Weight]) -> list[tuple[str, str, str]]:
    """(tensor, reason, what to do) for each scale of keys and values that a format's readers would not find."""
    if "cache" in fmt.holds:
        return []
    reason = f"no reader of {fmt.name} takes scales of keys and values"
    return [(weight.name, reason, "pack(format=compressed-tensors), or leave quantize.kv out") for weight in scales_of(weights)]


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


def calibrated(recipe: Recipe, number: int, pass_: WeightPass) -> str:
    """The command to run if the pass of that line has no calibration tokens."""
    lines = [str(line).removesuffix("()") for line in recipe.lines]
    whole = shlex.quote(" | ".join([*lines[: number - 1], "calibrate", *lines[number - 1 :]]))
    more = ", or give it data=..." if pass_.executor() == "train" else ""
    return f"compress run MODEL OUT -p {whole}; calibrate(data=...) reads your text, not the one that ships{more}"
