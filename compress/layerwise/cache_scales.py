"""Cache scales: those of a checkpoint, and a model that keeps keys and values so."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from compress.architecture.attention import SCALES, round_caches
from compress.architecture.weight_map import Model
from compress.contract.cache_pass import scales_of
from compress.errors import InputError
from compress.layerwise.dense_view import DenseView

if TYPE_CHECKING:
    from compress.layerwise.meta_model import MetaModel


def cache_scales(dense_view: DenseView, model: Model) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, scale of keys, scale of values) where a checkpoint has them. Raises InputError for ones that cannot be used."""
    heads = {attention.path: attention.heads for attention in model.attentions}
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for weight in scales_of(model.weights):
        scale = dense_view.checkpoint.read(weight.name).float()
        if scale.shape not in ((), (1,), (heads[weight.module], 1, 1)) or not bool((scale.isfinite() & (scale > 0)).all()):
            expected = f"a positive number, or one for each of {heads[weight.module]} heads"
            raise InputError(f"'{weight.name}'", expected, f"{list(scale.shape)}, from {scale.min():g}", "make it anew")
        found[weight.module][weight.attribute] = scale
    if found and (lacking := [f"{path}.{name}" for path in heads for name in SCALES if name not in found[path]]):
        raise InputError(f"'{lacking[0]}'", "a scale of keys and one of values in every layer", "no such tensor", "make it anew")
    return [(path, pair["k_scale"], pair["v_scale"]) for path, pair in found.items()]


def keep_as_told(meta_model: MetaModel) -> bool:
    """Makes a model round keys and values as the scales of its checkpoint say; returns whether it has any."""
    scales = cache_scales(meta_model.dense_view, meta_model.model)
    round_caches(meta_model.module, scales)
    return bool(scales)
