"""Attention: which modules keep keys and values, and what passes into a cache.

A module of transformers that keeps keys and values takes a cache as an argument and hands them to its `update`, keys after their
rotary positions, and goes on with what that returns. So whatever stands in for the cache sees them as they are kept, and can
change them, whatever the family. In a forward of whole texts no cache is needed for that: what stands in keeps nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

SCALES = ("k_scale", "v_scale")
"""Names of the scales of keys and values, as parameters of a module that keeps them."""
_CACHES = ("cache", "past_key_values")
"""Names of the argument, in transformers since 5.24 and before."""
_READ = ("k_proj", "qkv_proj")
_LATENT = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "wkv")

Seen = Callable[["torch.Tensor", "torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""(keys, values), each [samples, heads, tokens, width] -> what the cache keeps instead."""


@dataclass(frozen=True)
class Attention:
    """A module that keeps keys and values: its path, how many heads they have, and how wide a head is."""

    path: str
    heads: int
    width: int
    unfit: str = ""
    """Why no reader takes scales of its keys and values, or empty."""


def attentions(model: nn.Module) -> tuple[Attention, ...]:
    """Every module that keeps keys and values of its own: not linear attention, nor a layer that takes those of another."""
    text: Any = getattr(model.config, "get_text_config", lambda **_: model.config)(decoder=True)
    types = getattr(text, "layer_types", None) or []
    found: list[Attention] = []
    for path, module in model.named_modules():
        # A block is not its attention, even if it is called after it.
        block = path.rpartition(".")[2].isdecimal()
        if block or "attention" not in type(module).__name__.lower() or not argument_of(module):
            continue
        index = getattr(module, "layer_idx", None)
        linear = isinstance(index, int) and index < len(types) and "linear" in str(types[index])
        if not linear and not getattr(module, "is_kv_shared_layer", False):
            queries = getattr(text, "num_attention_heads", None) or 1
            heads = getattr(text, "num_key_value_heads", None) or queries
            width = getattr(module, "head_dim", None) or getattr(text, "hidden_size", 0) // queries
            found.append(Attention(path, heads, width, _unfit(model, module, heads, width)))
    inner = {attention.path for attention in found}
    # Some families wrap the module that attends in another one.
    return tuple(one for one in found if not any(path.startswith(f"{one.path}.") for path in inner))


def _unfit(model: Any, module: Any, heads: int, width: int) -> str:
    """Why no reader takes scales of a module's keys and values."""
    kind = type(module).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder keeps those of two texts"
    if any(hasattr(module, name) for name in _LATENT):
        return f"{kind} (multi-head latent attention) keeps one latent vector instead of them"
    if "cross" in kind.lower() or not any(getattr(module, name, None) is not None for name in _READ):
        return f"{kind} has neither k_proj nor qkv_proj, by which readers know attention"
    if (keys := getattr(module, "k_proj", None)) is not None and keys.out_features != heads * width:
        return f"{kind} has {keys.out_features} outputs of keys, and config.json says {heads} heads of {width} for all layers"
    return ""


def argument_of(module: nn.Module) -> str:
    """The name of the argument that takes a cache, empty for a module without."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return ""
    return next((name for name in _CACHES if name in parameters), "")


def watch_cache(module: nn.Module, seen: Seen) -> RemovableHandle:
    """Makes a module's keys and values pass through `seen` on their way into the cache, and to its attention."""
    name = argument_of(module)
    place = list(inspect.signature(module.forward).parameters).index(name)

    def stand_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > place:
            return (*args[:place], _Passing(args[place], seen), *args[place + 1 :]), kwargs
        return args, {**kwargs, name: _Passing(kwargs.get(name), seen)}

    return module.register_forward_pre_hook(stand_in, with_kwargs=True)


class _Passing:
    """What stands in for a cache, or for none; it keeps nothing itself."""

    def __init__(self, cache: Any, seen: Seen) -> None:
        self._cache, self._seen = cache, seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        kept = self._seen(key_states, value_states)
        return kept if self._cache is None else self._cache.update(*kept, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if self._cache is None:
            from transformers import DynamicCache

            return getattr(DynamicCache(), name)
        return getattr(self._cache, name)


def round_caches(model: nn.Module, scales: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    """Makes modules, by their paths, keep keys and values in FP8 E4M3 with these scales, as a reader does."""
    from compress.numerics.inputs import in_cache

    for path, k_scale, v_scale in scales:

        def rounded(
            keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor = k_scale, v: torch.Tensor = v_scale
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return in_cache(keys, k), in_cache(values, v)

        watch_cache(model.get_submodule(path), rounded)
