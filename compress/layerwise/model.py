"""Model: a runnable model from a checkpoint in any state; codes stay codes.

A module whose weight is one tensor in codes expands them whenever it is used (QLinear), to the same values as a reader;
weights that transformers fuses or splits while it loads are expanded once. The model is loaded block by block, so that at
most one block is dense at a time. Everything else is transformers' own model, `generate` included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.architecture import weight_map
from compress.architecture.qlinear import QLinear, with_codes
from compress.checkpoint.reader import Checkpoint
from compress.device import CPU, moved
from compress.errors import InputError
from compress.layerwise.cache_scales import keep_as_told
from compress.layerwise.dense_view import DenseView
from compress.layerwise.meta_model import MetaModel
from compress.numerics.qtensor import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(
    checkpoint: Checkpoint, dtype: str = "float32", rounded: bool = True, device: torch.device = CPU, cache: bool = True
) -> PreTrainedModel:
    """A model in eval mode, computing in `dtype` on `device`. Raises InputError for a packed checkpoint that cannot be read.

    Without `rounded`, dequantized weights of an fp32 model are not rounded to the dtype that the codes were made from; without
    `cache`, keys and values are not rounded, whatever scales the checkpoint has for them.
    """
    made = filled(checkpoint, dtype, rounded, device)
    if cache:
        keep_as_told(made)
    model: PreTrainedModel = made.module
    generation_config(model, checkpoint)
    return model


def generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Gives a model the generation_config.json of its directory. Raises InputError for an invalid one."""
    if model.can_generate() and (checkpoint.path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
        except Exception as error:  # transformers validates with exceptions of many kinds
            got = str(error).strip().partition("\n")[0]
            raise InputError(str(checkpoint.path / "generation_config.json"), "a valid config of generation", got) from None


def filled(checkpoint: Checkpoint, dtype: str, rounded: bool = True, device: torch.device = CPU) -> MetaModel:
    """A meta model with everything loaded, to stay."""
    meta_model = MetaModel(DenseView(checkpoint, rounded), getattr(torch, dtype), device)
    Loader(meta_model).load()
    _as_transformers_has_it(meta_model)
    return meta_model


class Loader:
    """Loads all of a meta model, or one block of it, codes as codes."""

    def __init__(self, meta_model: MetaModel) -> None:
        from transformers.pytorch_utils import Conv1D

        self.meta_model, self.dense_view = meta_model, meta_model.dense_view
        self.kinds = (nn.Linear, nn.Embedding, Conv1D)
        self.groups = {group.parameter: group for group in meta_model.mapping.groups(self.dense_view.logical)}
        self.names = {p: group.sources[0] for p, group in self.groups.items() if not group.patterns}
        self.placed: set[str] = set()
        self.ties = ties(meta_model.module, self.groups)

    def load(self) -> None:
        """Everything, a block at a time."""
        paths = [*(block.path for block in self.meta_model.blocks), *self.meta_model.lazy]
        parts = {path: self.meta_model.module_at(path) for path in paths}
        inside = tuple(f"{path}." for path in paths)
        self.encode([name for name in self.names if not name.startswith(inside)])
        for path in paths:
            self.load_part(path)
        for path in self.meta_model.lazy:
            # Embeddings and head stay loaded.
            parts[path]._forward_pre_hooks.clear()
        for alias, owner in self.ties.items():
            self.tie(alias, owner)
        inputs = {
            name for name, (_, state) in self.dense_view.weights.items() if state.scheme is not None and state.scheme.inputs
        }
        if lost := sorted(inputs - self.placed):
            raise InputError(
                lost[0], "a module of its own, whose activations can be rounded", f"{len(lost)} weights that transformers fuses",
                "unpack with to=dense: the weights alone",
            )  # fmt: skip

    def load_part(self, path: str) -> None:
        """What is under a path."""
        self.meta_model.load(path)
        self.encode([name for name in self.names if name.startswith(f"{path}.")])

    def encode(self, parameters: list[str]) -> None:
        """Replaces parameters by their codes, if they are made of one weight in codes."""
        for parameter in parameters:
            name = self.names[parameter]
            path, _, attribute = parameter.rpartition(".")
            module = self.meta_model.module_at(path)
            if name not in self.dense_view.weights or attribute != "weight" or not isinstance(module, self.kinds):
                continue
            weight, _ = self.dense_view.weights[name]
            if (q := self.dense_view.qtensor(name)) is None:
                continue
            self.placed.add(name)
            self.place(module, moved(q, self.meta_model.device), self.dense_view.dtype_of(weight))

    def place(self, module: nn.Module, q: QTensor, stored: torch.dtype) -> None:
        """Replaces the dense weight of a module, whose dtype is the compute dtype, by codes."""
        dense = module._parameters["weight"]
        assert dense is not None
        if dense.dtype == torch.float32 or not q.scheme.integer:
            # fp32 scales are exact; and transformers takes the first parameter's dtype for the model's.
            q = q.plain()
        with_codes(module, q, stored, dense.dtype)

    def tie(self, alias: str, owner: str) -> None:
        """Ties two parameters, whether they are dense or codes."""
        (path, _, attribute), (other, _, other_attribute) = alias.rpartition("."), owner.rpartition(".")
        module, held = self.meta_model.module_at(path), self.meta_model.module_at(other)
        if other_attribute in held._parameters:
            module._parameters[attribute] = held._parameters[other_attribute]
        elif attribute == "weight" and isinstance(module, self.kinds):
            assert isinstance(held, QLinear)
            self.place(module, held.quantized(), held.stored_dtype)
            if "scale" in held._parameters:
                module._parameters["scale"] = held.scale


def _as_transformers_has_it(meta_model: MetaModel) -> None:
    """Restores the settings that a meta model changes: the cache, and the implementation of experts."""
    fresh = weight_map.meta_model(meta_model.dense_view.checkpoint)
    for ours, theirs in zip(meta_model.module.modules(), fresh.modules(), strict=True):
        config: Any = getattr(ours, "config", None)
        for name in ("use_cache", "_experts_implementation"):
            if hasattr(config, name):
                setattr(config, name, getattr(theirs.config, name))


def ties(model: nn.Module, owned: Container[str]) -> dict[str, str]:
    """Tied parameters without tensors -> the tied one that has them; `owned` are parameters that have tensors."""
    clusters: dict[str, list[str]] = defaultdict(list)
    for alias, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        clusters[kept] += [alias] if clusters[kept] else [kept, alias]
    found: dict[str, str] = {}
    for members in clusters.values():
        # Two parameters with tensors of their own are not tied, whatever the config says.
        if owners := [name for name in members if name in owned]:
            found.update((name, owners[0]) for name in members if name not in owned)
    return found
