"""Whole blocks of one token as one call: the bits of the modules', whatever becomes of their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import compress
from block_oracle import block_differences
from compress.kernels.cpu.library import Library, library
from compress.layerwise.growing_cache import GrowingCache, argument
from compress.runtime.decode_block import block_of
from compress.runtime.decode_chain import QuickBlock
from compress.runtime.decode_step import quicken
from decoding import by_modules, packed, said
from families import build as build_family
from simd_oracle import USABLE
from support import SHARED, run


@pytest.fixture(autouse=True)
def products_of_torch() -> None:
    """Here products are those of the backend simd, which blocks are made of."""


@pytest.mark.parametrize("isa", USABLE)
def test_a_block_is_its_steps_one_after_another(isa: str) -> None:
    assert list(block_differences(Library(library().path, isa))) == []


def blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, QuickBlock)]


@pytest.mark.parametrize(("name", "taken"), [
    ("llama", 2), ("mistral", 2), ("qwen2", 2), ("qwen3", 2), ("gemma2", 0), ("mixtral", 0), ("gpt2", 0),
])  # fmt: skip
def test_which_families_have_such_blocks(name: str, taken: int, tmp_path: Path) -> None:
    assert len(blocks(compress.load(packed(name, tmp_path), "bfloat16"))) == taken


@pytest.mark.parametrize(("name", "scheme", "dtype"), [
    ("llama", "w4a16g32", "bfloat16"), ("llama", "nf4g32", "bfloat16"), ("llama", "fp8", "float32"), ("qwen2", "w3a16g32-asym", "float16"),
    ("qwen2", "w2a16g32, outliers=0.01", "bfloat16"), ("mistral", "nvfp4", "bfloat16"), ("llama", "w4a8g32", "bfloat16"),
    ("qwen2", "w8a8", "float32"), ("qwen3", "w4a16g32", "bfloat16"),
])  # fmt: skip
def test_a_block_has_the_bits_of_its_modules(name: str, scheme: str, dtype: str, tmp_path: Path) -> None:
    model, mask = compress.load(packed(name, tmp_path, scheme), dtype), torch.ones(3, 20, dtype=torch.long)
    assert len(blocks(model)) == 2
    own = by_modules(model)
    mask[1, :4] = 0
    for texts, masked in ((1, None), (3, mask), (13, None)):
        assert torch.equal(said(model, texts, masked), said(own, texts, masked))


def test_a_block_rounds_activations_where_that_was_asked_for(tmp_path: Path) -> None:
    model = compress.load(packed("llama", tmp_path), "bfloat16", "integers")
    assert len(blocks(model)) == 2
    assert torch.equal(said(model, 2), said(by_modules(model), 2))


def test_blocks_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, own = compress.load(packed("llama", tmp_path), "bfloat16"), list[list[int]](), Library.blocks
    monkeypatch.setattr(Library, "blocks", lambda self, jobs: (calls.append([job.count for job in jobs]), own(self, jobs))[1])
    said(model, 2)
    assert calls == [[count] * 2 for count in range(10, 16)]


def test_a_block_follows_its_parts(tmp_path: Path) -> None:
    """Weights that are changed in place, replaced, moved into adapters, and modules that someone listens to."""
    model: Any = compress.load(packed("llama", tmp_path), "bfloat16")
    found, layer = [said(model, 1)], model.model.layers[0]

    def changed() -> None:
        found.append(said(model, 1))
        assert torch.equal(found[-1], said(by_modules(model), 1))
        assert not torch.equal(found[-1], found[-2])

    weight = layer.mlp.up_proj.packed_weight
    weight._buffers["scale"].mul_(2)
    changed()
    weight._buffers["scale"] = weight._buffers["scale"] * 2
    changed()
    layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight * 2)
    changed()
    layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, nn.Dropout(1.0).train())
    changed()
    assert block_of(layer) is None
    assert block_of(model.model.layers[1]) is not None
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, given, out: out * 0)
    assert block_of(model.model.layers[1]) is None
    changed()


def test_other_caches_and_gradients_go_by_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = compress.load(packed("llama", tmp_path), "bfloat16")
    monkeypatch.setattr(Library, "blocks", lambda *given: pytest.fail("a block was called"))
    assert torch.equal(said(model, 1, kind=DynamicCache), said(by_modules(model), 1, kind=DynamicCache))
    held = GrowingCache(model.config)
    for ids in (torch.ones(1, 5, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)):
        logits = model(input_ids=ids, **{argument(model): held}).logits
    logits.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_a_block_with_rotated_inputs_or_factors_calls_its_modules(tmp_path: Path) -> None:
    for number, recipe in enumerate(
        ("quantize.rtn(scheme=w4a16g32-h32)", "quantize.loftq(scheme=w4a16g32, rank=4)", "quantize.rtn(scheme=fp8-afp8)")
    ):
        run(build_family("llama", tmp_path / str(number)), tmp_path / f"out{number}", f"{recipe} | pack(format=native)")
        assert not blocks(compress.load(tmp_path / f"out{number}", "bfloat16"))


def test_a_kernel_that_is_wrong_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = by_modules(compress.load(packed("llama", tmp_path), "float32")), Library.blocks

    def wrong(self: Library, jobs: Any) -> None:
        jobs[0].first_norm.epsilon += 1
        own(self, jobs)

    monkeypatch.setattr(Library, "blocks", wrong)
    quicken(model)
    assert not blocks(model)


def test_a_trained_model_writes_the_same_text(tmp_path: Path) -> None:
    source = SHARED / "models" / "tiny-llama-8m"
    if not source.is_dir():
        pytest.skip("no trained models beside this checkout")
    run(source, tmp_path / "out", "quantize.rtn(scheme=w4a16g32, ragged=channel) | pack(format=native)")
    model = compress.load(tmp_path / "out", "bfloat16")
    assert len(blocks(model)) == 8
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(3))
    texts = [one.generate(ids, max_new_tokens=300, do_sample=False) for one in (model, by_modules(model))]
    assert torch.equal(*texts)
