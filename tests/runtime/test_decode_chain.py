"""Blocks that run when the first is called, and who may come in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.kernels.cpu.library import Library
from compress.layerwise.growing_cache import GrowingCache, argument
from decoding import by_modules, packed, said


@pytest.fixture(autouse=True)
def products_of_torch() -> None:
    """Here products are those of the backend simd, which blocks are made of."""


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return compress.load(packed("llama", tmp_path), "bfloat16")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each call has."""
    calls, own = list[int](), Library.blocks
    monkeypatch.setattr(Library, "blocks", lambda self, jobs: (calls.append(len(jobs)), own(self, jobs))[1])
    return calls


CHANGES: list[Callable[..., Any]] = [
    lambda module, given, out: out * 2,
    lambda module, given, out: out.mul_(2),
    lambda module, given, out: None,
]


@pytest.mark.parametrize("change", CHANGES, ids=["replaced", "in place", "looked at"])
def test_numbers_that_are_changed_between_blocks(change: Callable[..., Any], model: Any, jobs: list[int]) -> None:
    own = by_modules(model)
    plain = said(model, 2)
    assert set(jobs) == {2}
    for one in (model, own):
        one.model.layers[0].register_forward_hook(change)
    assert torch.equal(said(model, 2), said(own, 2))
    assert torch.equal(said(model, 2), plain) is (change is CHANGES[2])


def test_in_inference_mode_changes_are_not_told_and_every_block_runs_for_itself(model: Any, jobs: list[int]) -> None:
    with torch.inference_mode():
        found = said(model, 2)
    assert set(jobs) == {1}
    assert torch.equal(found, said(by_modules(model), 2))


def test_blocks_that_are_changed_or_left_out(model: Any, jobs: list[int]) -> None:
    """A chain ends before a block whose modules have to be called, and what it has computed for no one counts nowhere."""
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out * 2)
    assert torch.equal(said(model, 1), said(by_modules(model), 1))
    assert set(jobs) == {1}
    hook.remove()
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1
    assert torch.equal(said(model, 1), said(by_modules(model), 1))


def test_a_block_that_fails_leaves_the_caches_behind_it_as_they_were(model: Any) -> None:
    held = GrowingCache(model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.long), **{argument(model): held})
        hook = model.model.layers[1].register_forward_pre_hook(lambda *given: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            model(input_ids=torch.ones(1, 1, dtype=torch.long), **{argument(model): held})
    assert [layer.get_seq_length() for layer in held.layers] == [6, 5]
    hook.remove()


def test_tokens_that_are_taken_back(model: Any) -> None:
    """As assisted generation does."""
    held, ids = GrowingCache(model.config), torch.arange(3, 12)[None]
    with torch.no_grad():
        model(input_ids=ids, **{argument(model): held})
        first = model(input_ids=ids[:, :1], **{argument(model): held}).logits
        model(input_ids=ids[:, 2:3], **{argument(model): held})
        for layer in held.layers:
            layer.crop(-2)
        assert torch.equal(model(input_ids=ids[:, :1], **{argument(model): held}).logits, first)


def test_several_texts_at_once_in_threads(model: Any) -> None:
    def written(seed: int) -> list[int]:
        ids = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(seed))
        text: list[int] = model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
        return text

    alone = [written(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(written, range(4))) == alone


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_has_the_same_bits(threads: int, model: Any) -> None:
    before, meant = torch.get_num_threads(), said(by_modules(model), 3)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(said(model, 3), meant)
    finally:
        torch.set_num_threads(before)


def test_a_copy_of_a_model_has_a_chain_of_its_own(model: Any) -> None:
    other = copy.deepcopy(model)
    chains = [one.model.layers[0].quick_chain for one in (model, other)]
    assert chains[0] is not chains[1]
    said(other, 1)
    assert [block() for block in chains[1].blocks] == [*other.model.layers]
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.packed_weight._buffers["scale"].mul_(2)
    assert torch.equal(said(other, 1), said(by_modules(other), 1))
    assert not torch.equal(said(other, 1), said(model, 1))
