"""A model that is never whole: block by block, every family gives the logits of transformers' own loader, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.checkpoint.reader import open_checkpoint
from compress.layerwise.dense_view import DenseView
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.stepwise import ForwardHooks, StepwiseForward
from families import FAMILIES, build
from support import load, logits, shared

Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build(name, folder)


class Walker(SimpleNamespace):
    """A model as `support.logits` calls it, made of a meta model. `held` is the bytes of parameters seen at each block."""

    def __call__(self, **inputs: torch.Tensor) -> Any:
        meta_model: MetaModel = self.meta_model
        self.passed, self.held = [], []
        with torch.no_grad(), ForwardHooks(meta_model) as hooks:
            forward = StepwiseForward(meta_model, inputs)
            call = forward.advance()
            while call is not None:
                self.passed.append(call.block.path)
                meta_model.release_visitors()
                meta_model.load(call.block.path)
                out = hooks.visit(call).finish()
                self.held.append(resident(meta_model.module))
                meta_model.release(call.block.path)
                assert all(p.is_meta for p in meta_model.module_at(call.block.path).parameters())
                call = forward.advance(out)
            return forward.output


def walker(directory: Path, dtype: torch.dtype) -> Walker:
    meta_model = MetaModel(DenseView(open_checkpoint(directory)), dtype)
    return Walker(meta_model=meta_model, config=meta_model.module.config, dtype=dtype)


def resident(model: torch.nn.Module) -> int:
    """Bytes of parameters that are in memory; storage that several share counts once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta}
    return sum(storages.values())


@pytest.mark.parametrize(("name", "dtype"), shared([*FAMILIES], [torch.float32, torch.bfloat16]))
def test_logits_are_those_of_the_whole_model(name: str, dtype: torch.dtype, source: Source) -> None:
    ours = walker(source(name), dtype)
    got, whole = logits(ours), load(source(name), dtype=dtype)
    wanted = logits(whole)
    assert torch.equal(got, wanted), f"off by {(got - wanted).abs().max()}"
    # llava's text needs no vision tower.
    passed = [b.path for b in ours.meta_model.blocks if not b.stack.startswith("tower:vision")]
    assert sorted(ours.passed) == sorted(passed)
    size = {path: sum(p.nbytes for p in whole.get_submodule(path).parameters()) for path in ours.passed}
    rest = resident(walker(source(name), dtype).meta_model.module)
    for path, held in zip(ours.passed, ours.held, strict=True):
        assert held <= rest + size[path] + 64, "one block at a time, and neither embeddings nor head with it"


def test_embeddings_and_head_are_gone_between_calls(tiny: Path) -> None:
    meta_model = MetaModel(DenseView(open_checkpoint(tiny)), torch.float32)
    assert sorted(meta_model.lazy) == ["lm_head", "model.embed_tokens"]
    embedding = meta_model.module.get_input_embeddings()
    assert embedding.weight.shape == (128, 64)
    assert embedding.weight.untyped_storage().nbytes() == 4
    found = embedding(torch.tensor([5]))
    assert torch.equal(found[0], meta_model.dense_view.dense("model.embed_tokens.weight")[5].float())
    meta_model.release_visitors()
    assert bool(embedding.weight.isnan().all())


def test_a_weight_that_was_replaced_is_used_and_then_forgotten(tiny: Path) -> None:
    meta_model = MetaModel(DenseView(open_checkpoint(tiny)), torch.float32)
    path, name = "model.layers.0", "model.layers.0.self_attn.q_proj.weight"
    meta_model.load(path)
    before = meta_model.module.get_parameter(name).clone()
    meta_model.replace({name: torch.zeros(before.shape, dtype=torch.bfloat16)})
    assert not bool(meta_model.module.get_parameter(name).any())
    meta_model.release(path)
    meta_model.load(path)
    assert torch.equal(meta_model.module.get_parameter(name), before)
