"""generate() of a packed model makes a cache that grows where nobody asks for another, and says the same with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import compress
import compress.hf
from compress.layerwise.growing_cache import GrowingCache, argument
from compress.runtime.generation_cache import GrowingGeneration
from families import build as build_family
from support import run

RECIPE = "quantize.rtn(scheme=w4a16g32, ragged=channel) | pack(format=native)"


@pytest.fixture(scope="module", params=["llama", "gemma3", "mixtral"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    run(build_family(request.param, folder), folder / "out", RECIPE)
    return folder / "out"


@pytest.fixture
def model(packed: Path) -> Any:
    return compress.load(packed, "float32")


def texts(model: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    """What is said after two prompts, one of which is padded, and the cache that was used."""
    torch.manual_seed(5)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 14, "min_new_tokens": 14, "pad_token_id": 0}
    found = model.generate(ids, **given, return_dict_in_generate=True, **options)
    return found.sequences, found.get(argument(model))


DRAWN = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}


@pytest.mark.parametrize("how", [{"do_sample": False}, DRAWN], ids=["greedy", "drawn"])
def test_the_same_is_said_with_it(how: dict[str, Any], model: Any) -> None:
    found, used = texts(model, **how)
    assert type(used) is GrowingCache
    meant, other = texts(model, **how, **{argument(model): DynamicCache(config=model.config)})
    assert type(other) is DynamicCache
    assert torch.equal(found, meant)


def test_transformers_loads_it_with_that(packed: Path, model: Any) -> None:
    found, used = texts(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), do_sample=False)
    assert type(used) is GrowingCache
    assert torch.equal(found, texts(model, do_sample=False)[0])


def test_what_is_asked_for_is_what_is_used(model: Any) -> None:
    for options, kind in (
        ({"cache_implementation": "dynamic"}, DynamicCache),
        ({"cache_implementation": "static"}, StaticCache),
        ({"use_cache": False}, type(None)),
        ({"num_beams": 2}, DynamicCache),
        ({"num_beams": 2, "do_sample": True}, DynamicCache),
        ({"prompt_lookup_num_tokens": 2}, DynamicCache),
    ):
        if "prompt_lookup_num_tokens" in options:
            ids = torch.arange(3, 12)[None]
            used = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **options).get(argument(model))
        else:
            used = texts(model, **{"do_sample": False, **options})[1]
        assert type(used) is kind, options
    mine = GrowingCache(model.config)
    assert texts(model, do_sample=False, **{argument(model): mine})[1] is mine


def test_beams_say_what_they_said(model: Any) -> None:
    own = copy.deepcopy(model)
    own.__class__ = type(model).__mro__[2]
    assert torch.equal(texts(model, num_beams=3, do_sample=False)[0], texts(own, num_beams=3, do_sample=False)[0])
    assert type(texts(own, do_sample=False)[1]) is DynamicCache


def test_a_model_is_of_its_class_and_a_copy_uses_its_own_cache(model: Any) -> None:
    own = type(model).__mro__[2]
    assert isinstance(model, own)
    assert repr(type(model)) == repr(own)
    other = copy.deepcopy(model)
    assert torch.equal(texts(other, do_sample=False)[0], texts(model, do_sample=False)[0])


def test_what_does_not_decode_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("bert", "t5"):
        run(build_family(name, tmp_path), tmp_path / f"{name}-out", RECIPE)
    assert not isinstance(compress.load(tmp_path / "bert-out", "float32"), GrowingGeneration)
    model: Any = compress.load(tmp_path / "t5-out", "float32")
    used = model.generate(torch.randint(3, 100, (1, 5)), max_new_tokens=4, return_dict_in_generate=True).get(argument(model))
    assert {type(layer) for layer in used.self_attention_cache.layers} == {DynamicLayer}
