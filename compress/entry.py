"""Entry: how a source enters a recipe: as it is, or through unpack."""

from __future__ import annotations

from compress import names
from compress.checkpoint import Checkpoint
from compress.contract import WeightPass
from compress.errors import RecipeError
from compress.meaning import Meaning
from compress.recipe import Recipe
from compress.resolve import resolve


def enter(recipe: Recipe, source: Checkpoint, allow_dtype_mismatch: bool = False) -> tuple[names.Model, Meaning | None]:
    """The model, and what its stored tensors mean where they are packed. Raises CompressError."""
    first = resolve(recipe)[0]
    if not (isinstance(first, WeightPass) and first.unpacks):
        return names.resolve(source, allow_dtype_mismatch), None
    meaning = Meaning(source)
    if not meaning.packed:
        where = f"{recipe.lines[0].where or 1}: {first.pass_name()}"
        raise RecipeError(where, "a packed artifact", "a checkpoint with nothing to unpack", "leave this line out")
    # A packed file's dtypes are its format's, so config.json's says nothing of them.
    return meaning.resolve(names.meta_model(source)), meaning
