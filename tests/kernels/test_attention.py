"""Attention of single queries on a CPU: the kernel against fp64, and packed models whose attention it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.kernels.cpu.library import CBlock, Library
from compress.kernels.native import simd
from compress.layerwise.growing_cache import GrowingCache, argument
from compress.runtime import attention
from families import build as build_family
from simd_oracle import ROUNDING, USABLE, at_the_end_of_a_page, attends
from simd_oracle import attention as slow_attention
from support import run


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_attention_is_what_fp64_has(dtype: torch.dtype, isa: str) -> None:
    assert list(attends(Library(simd.library().path, isa), dtype)) == []


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_nothing_is_read_beyond_its_end(dtype: torch.dtype, isa: str) -> None:
    shapes, held = ((2, 6, 48), (2, 2, 261, 48), (2, 2, 261, 80)), []
    (q, _), (k, _), (v, _) = held = [at_the_end_of_a_page(torch.randn(shape).to(dtype)) for shape in shapes]
    mask, _ = at_the_end_of_a_page(torch.ones(2, 261, dtype=torch.bool))
    found = Library(simd.library().path, isa).attend(q, k, v, 0.1, mask)
    torch.testing.assert_close(found.double(), slow_attention(q, k, v, 0.1, None), rtol=2 * ROUNDING[dtype], atol=1e-5)
    assert len(held) == 3


@pytest.mark.parametrize("isa", USABLE)
def test_threads_change_no_bit(isa: str) -> None:
    runs, before, found = Library(simd.library().path, isa), torch.get_num_threads(), []
    q, k = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 2, 900, 64).bfloat16()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(runs.attend(q, k, k, 0.1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("isa", USABLE)
def test_numbers_that_are_none_stay_so(isa: str) -> None:
    runs, q, k = Library(simd.library().path, isa), torch.randn(1, 2, 32), torch.randn(1, 2, 40, 32)
    wrong = k.clone()
    wrong[0, 1, 7, 3] = torch.nan
    found = runs.attend(q, wrong, k, 1.0)
    assert bool(found[0, 0].isfinite().all())
    assert bool(found[0, 1].isnan().all())
    # Scores far apart: the largest takes all, and nothing overflows.
    assert torch.equal(runs.attend(q * 1e4, k, k, 1.0)[0, 0], k[0, 0, (k[0, 0] @ q[0, 0]).argmax()])
    assert not runs.attend(q, k, k, 1.0, torch.zeros(1, 40, dtype=torch.bool)).any()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The keys of each call of the kernel, by itself or in a block."""
    found: list[int] = []
    plain, whole = Library.attend, Library.blocks

    def attend(self: Library, query: torch.Tensor, key: torch.Tensor, *more: Any) -> torch.Tensor:
        found.append(key.shape[2])
        return plain(self, query, key, *more)

    def blocks(self: Library, jobs: Sequence[CBlock]) -> None:
        found.extend(job.count for job in jobs)
        whole(self, jobs)

    monkeypatch.setattr(Library, "attend", attend)
    monkeypatch.setattr(Library, "blocks", blocks)
    return found


@pytest.fixture(scope="module", params=["llama", "gemma3", "mixtral", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    run(
        build_family(request.param, folder), folder / "out", "quantize.rtn(scheme=w4a16g16, ragged=channel) | pack(format=native)"
    )
    return compress.load(folder / "out", "float32")


def scores(model: Any, how: str, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits of six greedy steps."""
    model.set_attn_implementation(how)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(found.scores)


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=["default", "static", "beams"]
)
@pytest.mark.parametrize("padding", [0, 3])
def test_models_compute_what_sdpa_does(model: Any, padding: int, options: dict[str, Any], calls: list[int]) -> None:
    ids, mask = torch.randint(5, 60, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :padding] = 0
    if options.get("cache_implementation") == "static" and not model._can_compile_fullgraph:
        pytest.skip("the model has no static cache")
    wanted = scores(model, "sdpa", ids, mask, disable_compile=True, **options)
    assert calls == []
    found = scores(model, attention.NAME, ids, mask, disable_compile=True, **options)
    layers = model.config.get_text_config().num_hidden_layers
    assert len(calls) == 5 * layers
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_it_is_chosen_where_sdpa_would_be(model: Any, calls: list[int], tmp_path: Path) -> None:
    model.set_attn_implementation(attention.NAME)
    model.save_pretrained(tmp_path / "saved")
    assert attention.NAME not in (tmp_path / "saved" / "config.json").read_text()
    ids = torch.randint(5, 60, (1, 8))
    model.requires_grad_(False)
    cache = GrowingCache(model.config)
    model(ids, **{argument(model): cache}, use_cache=True)
    one = torch.zeros(1, 1, dtype=torch.long)
    # Gradients go through torch's attention; the kernel has none.
    embedded = model.get_input_embeddings()(one).detach().requires_grad_()
    model(inputs_embeds=embedded, **{argument(model): cache}, use_cache=True).logits.sum().backward()
    assert calls == []
    assert bool(embedded.grad.isfinite().all())


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"dropout": 0.1}, False),
        ({"softcap": 30.0}, False),
        ({"attention_mask": torch.zeros(2, 1, 1, 9)}, False),
        ({"attention_mask": torch.ones(2, 4, 1, 9, dtype=torch.bool)}, False),
        ({"attention_mask": torch.ones(1, 1, 1, 9, dtype=torch.bool)}, True),
        ({"query": torch.randn(2, 4, 2, 32)}, False),
        ({"query": torch.randn(2, 4, 1, 32, dtype=torch.float64)}, False),
        ({"query": torch.randn(2, 4, 1, 64)[..., ::2]}, False),
        ({"query": torch.randn(2, 4, 1, 32, requires_grad=True)}, False),
        ({"query": torch.randn(2, 4, 1, 24), "key": torch.randn(2, 2, 9, 24)}, False),
    ],
)
def test_what_the_kernel_takes(changed: dict[str, Any], taken: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: ("sdpa", None))
    key = torch.randn(2, 2, 9, 32)
    asked = {"query": torch.randn(2, 4, 1, 32), "key": key, "value": key, "attention_mask": None, **changed}
    found, _ = attention.attention(torch.nn.Module(), **asked)
    assert (found is not None and not isinstance(found, str)) == taken == bool(calls)
    if taken:
        q, k, v, mask = asked["query"], asked["key"], asked["value"], asked["attention_mask"]
        meant = slow_attention(q[:, :, 0], k, v, 32**-0.5, None if mask is None else mask[:, 0, 0].expand(2, -1))
        torch.testing.assert_close(found[:, 0].double(), meant, rtol=0, atol=1e-5)
