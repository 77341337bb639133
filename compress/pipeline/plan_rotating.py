"""Plan rotating: what a rotating pass will do, from headers only.

A head that is tied to the embeddings becomes a tensor first, if the pass may.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.architecture.rotations import Rotations, rotations, spaces_of
from compress.architecture.sizes import sizes_of
from compress.architecture.unused import further_tokens
from compress.architecture.weight_map import Model, meta_model, place
from compress.checkpoint.reader import Checkpoint, Logical
from compress.contract.rotating_pass import RotatingPass
from compress.errors import InputError
from compress.spec.weight_state import DENSE

_TIE = "tie_word_embeddings"


def rotated(
    pass_: RotatingPass, checkpoint: Checkpoint, model: Model, config: dict[str, Any]
) -> tuple[Model, dict[str, Any], Rotations]:
    """The model after a rotating pass, its config.json, and what becomes of each tensor.

    Raises InputError for a model whose function it would not keep.
    """
    tied = not any(weight.kind == "head" for weight in model.weights)
    spaces = spaces_of(model.weights, model.family, config, pass_.r1, pass_.r2)
    sizes = sizes_of(replace(checkpoint, config=config))
    first = rotations(model.weights, model.family, spaces, sizes, pass_.r1, pass_.r2, pass_.kind)
    if not pass_.r1:
        return model, config, first
    if lost := further_tokens(model):
        got = f"{len(lost)} that predict further tokens, which transformers does not take: they would read another stream"
        raise InputError(f"'{lost[0]}'", "tensors of the model alone", got, "take them out, or give r1=false")
    there = {weight.name for weight in model.weights}
    if twice := [alias for alias in model.duplicates if alias in there]:
        got = f"another tensor than {model.duplicates[twice[0]]}, to which config.json ties it"
        raise InputError(f"'{twice[0]}'", "the embeddings, or a head that is not tied", got, f"set {_TIE}=false in config.json")
    if not tied:
        return model, config, first
    whole = next(weight for weight in model.weights if weight.kind == "embedding")
    if not pass_.untie:
        got = f"a head that is tied to '{whole.name}', which cannot take that gain and be the embeddings"
        do = f"give untie=true, for {whole.nbytes:,} bytes more; or only values with r1=false"
        raise InputError("quantize.rotate", "a head that takes the last norm's gain, for R1", got, do)
    config = {**config, _TIE: False}
    untied = _untied(replace(checkpoint, config=config), model, whole.name)
    found = rotations(untied.weights, model.family, spaces, sizes, pass_.r1, pass_.r2, pass_.kind)
    new = next(weight.name for weight in untied.weights if weight.name not in there)
    turns = {name: replace(turn, source=whole.name if name == new else turn.source) for name, turn in found.turns.items()}
    return untied, config, replace(found, turns=turns)


def _untied(checkpoint: Checkpoint, model: Model, whole: str) -> Model:
    """The model with another tensor for whichever of embeddings and head `whole` is not."""
    meta: Any = meta_model(checkpoint)
    both = (meta.get_input_embeddings(), meta.get_output_embeddings())
    old = next(weight for weight in model.weights if weight.name == whole)
    found = {f"{path}.weight" for path, module in meta.named_modules() if module in both} - {f"{old.module}.{old.attribute}"}
    if not found:
        got = f"{type(meta).__name__}, whose output is that of the last norm"
        raise InputError("quantize.rotate", "a model with a head, for R1", got, "give r1=false")
    (new,) = found
    logical = {weight.name: Logical(weight.dtype, weight.shape, DENSE, False) for weight in model.weights}
    logical[new] = Logical(old.dtype, old.shape, DENSE, False)
    return place(checkpoint, logical, meta, allow_dtype_mismatch=True)
