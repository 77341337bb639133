"""Entry: reads a recipe's source: plain, or packed for unpack."""

from __future__ import annotations

from compress.architecture import weight_map
from compress.checkpoint.reader import Checkpoint
from compress.errors import RecipeError
from compress.layerwise.dense_view import DenseView
from compress.pipeline.resolve import resolve
from compress.spec.recipe import Recipe


def enter(recipe: Recipe, source: Checkpoint, allow_dtype_mismatch: bool = False) -> tuple[weight_map.Model, DenseView | None]:
    """The model, and for a packed source its DenseView. Raises CompressError."""
    first = resolve(recipe)[0]
    if not first.unpacks:
        return weight_map.resolve(source, allow_dtype_mismatch), None
    dense_view = DenseView(source)
    if not dense_view.packed:
        where = f"{recipe.lines[0].where or 1}: {first.pass_name()}"
        raise RecipeError(where, "a packed artifact", "a checkpoint with nothing to unpack", "leave this line out")
    # A packed file's dtypes are those of its format, so they are not compared with config.json's.
    return dense_view.resolve(weight_map.meta_model(source)), dense_view
