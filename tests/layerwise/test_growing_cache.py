"""Growing cache: the same keys and values as transformers' own cache has, whatever is done to it, with room for more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from compress.layerwise.growing_cache import ROOM, GrowingCache, GrowingLayer, argument
from families import build as build_family

CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda cache: None,
    "crop": lambda cache: cache.crop(-3),
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
}


@pytest.fixture(scope="module", params=["llama", "gemma3", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        build_family(request.param, tmp_path_factory.mktemp("models")), dtype="float32"
    ).eval()


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_it_has_what_the_default_cache_has(model: Any, change: str) -> None:
    logits = []
    for cache in (DynamicCache(config=model.config), GrowingCache(model.config)):
        generator = torch.Generator().manual_seed(0)
        model(torch.randint(5, 60, (2, 12), generator=generator), **{argument(model): cache}, use_cache=True)
        model(torch.randint(5, 60, (2, 1), generator=generator), **{argument(model): cache}, use_cache=True)
        CHANGES[change](cache)
        texts = {"repeat": 4, "select": 1}.get(change, 2)
        more = [torch.randint(5, 60, (texts, n), generator=generator) for n in (1, 5, 1)]
        logits.append([model(ids, **{argument(model): cache}, use_cache=True).logits for ids in more])
        assert cache.get_seq_length() == {"reset": 0, "crop": 10}.get(change, 13) + 7
    for wanted, found in zip(*logits, strict=True):
        assert torch.equal(wanted, found)


@torch.no_grad()
def test_texts_are_continued_alike(model: Any, tmp_path: Path) -> None:
    ids = torch.randint(5, 60, (2, 9))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, **{argument(model): GrowingCache(model.config)}, **options)
    )


def test_it_copies_once_in_many_tokens() -> None:
    layer, keys = GrowingLayer(), torch.randn(1, 2, 7, 4)
    places = set()
    for _ in range(2000):
        key, value = torch.randn(2, 1, 2, 1, 4)
        keys = torch.cat([keys, key], -2) if layer.is_initialized else key
        found, _ = layer.update(key, value)
        places.add(found.data_ptr())
        assert layer.keys.untyped_storage().nbytes() <= 4 * 8 * max(found.shape[-2] * 1.25, found.shape[-2] + ROOM)
    assert torch.equal(found, keys)
    assert len(places) <= 8


def test_a_copy_is_its_own() -> None:
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 1, 2, 3, 4))
    other, kept = copy.deepcopy(layer), layer.keys.clone()
    other.update(*torch.ones(2, 1, 2, 1, 4))
    layer.update(*torch.zeros(2, 1, 2, 1, 4))
    assert torch.equal(layer.keys[..., :3, :], kept)
    assert not layer.keys[..., 3, :].any()
    assert bool((other.keys[..., 3, :] == 1).all())


def test_gradients_go_through_earlier_tokens() -> None:
    layer, first = GrowingLayer(), torch.randn(1, 2, 3, 4, requires_grad=True)
    layer.update(first, first)
    layer.update(*torch.randn(2, 1, 2, 1, 4))
    layer.keys.sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))
