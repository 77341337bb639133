"""Plan slicing: the smaller model that a slicing pass will make.

It is checked by building it, without data, from its config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.architecture.sizes import resized_config, sizes_of
from compress.architecture.weight_map import Model, meta_model, place
from compress.checkpoint.reader import Checkpoint, Logical
from compress.contract.slicing_pass import SlicingPass, Structure
from compress.contract.step_plan import Cut
from compress.errors import InputError, Refusal
from compress.spec.kept import Kept, Sizes
from compress.spec.weight_state import DENSE, Note, State, Weight


@dataclass(frozen=True)
class SmallerModel:
    """The model that a slicing pass will make."""

    cut: Cut
    config: dict[str, Any]
    """Its config.json; which layers of several types stay is known only when the step has run."""
    model: Model
    notes: list[Note]


def smaller_model(
    pass_: SlicingPass, checkpoint: Checkpoint, model: Model, weights: Sequence[Weight], config: dict[str, Any],
    states: Mapping[str, State],
) -> SmallerModel:  # fmt: skip
    """The smaller model, from headers only. Raises Refusal with what prevents it; InputError for a config without sizes."""
    chosen = pass_.chosen(weights)
    for weight in chosen:
        pass_.becomes(weight, states[weight.name])
    here = replace(checkpoint, config=config)
    before = sizes_of(here)
    structure = Structure(model.family, tuple(chosen), before)
    after = pass_.resized(structure)
    _check(before, after)
    if before.layers != after.layers:
        _check_alike(chosen)
    kept = Kept.first(after, before)
    made = resized_config(config, before, after, kept.layers)
    names = {one.name: one.source for one in structure.slices(after)}
    logical = {name: Logical(names[name].dtype, shape, DENSE, False) for name, shape in structure.shapes(after).items()}
    try:
        there = replace(checkpoint, config=made)
        placed = place(there, logical, meta_model(there), allow_dtype_mismatch=True)
    except InputError as error:
        problem = error.problems[0]
        reason = f"transformers builds another model from these sizes: {problem.where}: {problem.expected}, not {problem.got}"
        raise Refusal(reason, "choose other sizes, such as a number of heads that goes with hidden") from None
    changes = before.changes(after) or "no part is left out, only their order changes"
    notes = [Note("sliced", changes, tuple(weight.name for weight in placed.weights))]
    if left := tuple(weight.name for weight in weights if not weight.module):
        notes.append(Note("dropped", "tensors that the model does not take", left))
    cut = Cut(model.family, tuple(chosen), before, after, config, tuple(pass_.trained(chosen)))
    if cut.trained:
        notes.append(Note("trained", f"weights, by {pass_.pass_name()}", tuple(w.name for w in placed.weights)))
    return SmallerModel(cut, made, placed, notes)


def _check(before: Sizes, after: Sizes) -> None:
    """Raises Refusal for sizes that cannot be cut out of a model."""
    for name in ("layers", "hidden", "groups", "units", "experts", "expert_units", "shared_units"):
        old, new = getattr(before, name), getattr(after, name)
        if old and not 1 <= new <= old:
            raise Refusal(f"{name} of {new}, and the model has {old}", f"choose from 1 to {old}")
    joined = after.queries == before.queries and not before.groups % after.groups
    if after.queries % after.groups or not (joined or 1 <= after.share <= before.share):
        reason = f"{after.queries} query heads for {after.groups} key-value heads, which have up to {before.share} each"
        raise Refusal(reason, "choose as many query heads for each key-value head")


def _check_alike(weights: Sequence[Weight]) -> None:
    """Raises Refusal if layers have different tensors: their number alone does not say the shapes then."""
    shapes: dict[int, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    for weight in weights:
        if weight.block is not None:
            inside = weight.module.partition(f".{weight.block}.")[2]
            shapes[weight.block].add((f"{inside}.{weight.attribute}", weight.shape))
    first = min(shapes)
    if odd := [block for block, found in shapes.items() if found != shapes[first]]:
        raise Refusal(f"layer {odd[0]} has other tensors than layer {first}", "keep all layers")
