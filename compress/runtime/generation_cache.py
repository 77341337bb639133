"""Generation cache: generate() of a packed model makes a cache that grows.

transformers' own copies all keys and values at every token. Whoever hands over a cache, names an implementation or wants none
gets what was asked for. Beams and assisted generation, which go back in a cache, keep what transformers makes.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.generation.configuration_utils import GenerationMode

from compress.layerwise.growing_cache import GrowingCache, argument

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class GrowingGeneration:
    """Mixed into a model that generates."""

    def _prepare_cache_for_generation(self, config: Any, given: dict[str, Any], mode: Any, *more: Any, **named: Any) -> Any:
        """Puts a cache into the arguments of forwards, where transformers would put one of its usual kind."""
        model: Any = self
        name = argument(model)
        had = given.get(name)
        done = super()._prepare_cache_for_generation(config, given, mode, *more, **named)  # type: ignore[misc]
        usual = had is None and type(given.get(name)) is DynamicCache and config.cache_implementation is None
        if usual and mode in _MODES and not config.is_assistant and model.device.type == "cpu":
            given[name] = GrowingCache(model.config.get_text_config(decoder=True))
        return done


def grow_caches(model: Any) -> None:
    """Has a model that generates do so with a cache that grows."""
    own = type(model)
    if not model.can_generate() or issubclass(own, GrowingGeneration):
        return
    if own not in _MIXED:
        # By its names transformers finds what it knows of a class.
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        _MIXED[own] = type(own.__name__, (GrowingGeneration, own), names)
    model.__class__ = _MIXED[own]


_MIXED: dict[type, type] = {}
