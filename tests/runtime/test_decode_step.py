"""Quick forwards of norms, attention and gated products: who takes them, and that models say the same with them."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.kernels.cpu.library import Library
from compress.layerwise.growing_cache import GrowingCache, argument
from compress.runtime import decode_step
from compress.runtime.decode_step import QuickAttention, QuickGated, QuickNorm, quicken
from decoding import packed, said
from support import SHARED, run

KINDS = (QuickNorm, QuickAttention, QuickGated)
TAKEN = {
    "llama": (5, 2, 2), "mistral": (5, 2, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2), "gemma2": (9, 0, 0), "mixtral": (5, 2, 0),
    "gpt2": (0, 0, 0),
}  # fmt: skip
"""Norms, attention and gated products that take a quick forward, of two blocks."""


def counted(model: nn.Module) -> tuple[int, ...]:
    return tuple(sum(isinstance(module, kind) for module in model.modules()) for kind in KINDS)


def slow(model: Any) -> Any:
    """A copy in which every module has its own forward."""
    found = copy.deepcopy(model)
    for module in found.modules():
        if isinstance(module, KINDS):
            module.__class__ = type(module).__mro__[2]
    assert counted(found) == (0, 0, 0)
    return found


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_families_say_the_same(name: str, dtype: str, bound: float, tmp_path: Path) -> None:
    model = compress.load(packed(name, tmp_path), dtype)
    assert counted(model) == TAKEN[name]
    own, mask = slow(model), torch.ones(3, 20, dtype=torch.long)
    mask[1, :4] = 0
    for texts, masked in ((1, None), (3, None), (3, mask)):
        found, meant = said(model, texts, masked), said(own, texts, masked)
        assert (found - meant).norm() <= bound * meant.norm()


def test_quick_forwards_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = compress.load(packed("llama", tmp_path), "bfloat16"), Counter[str]()
    runs = decode_step.library()
    for name in ("norm", "rotary", "gate"):
        own = getattr(runs, name)
        monkeypatch.setattr(runs, name, lambda *given, own=own, name=name: (calls.update([name]), own(*given))[1], raising=False)
    said(model, 2)
    assert calls == {"norm": 5 * 6, "rotary": 2 * 6, "gate": 2 * 6}
    calls.clear()
    said(model, 2, tokens=0)  # a prompt of 18 tokens goes by their own code
    assert not calls
    model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=False)  # gradients of norms are wanted
    assert "norm" not in calls


def test_norms_of_heads_may_be_listened_to_and_learn(tmp_path: Path) -> None:
    model: Any = compress.load(packed("qwen3", tmp_path), "float32")
    meant, norm, seen = said(model, 2), model.model.layers[0].self_attn.q_norm, list[Any]()
    norm.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert torch.allclose(said(model, 2), meant, atol=1e-5)
    assert seen[1] == (2 * model.config.num_attention_heads, model.config.head_dim)
    model.requires_grad_(False)
    norm.weight.requires_grad_(True)
    held = GrowingCache(model.config)
    model(input_ids=torch.ones(1, 1, dtype=torch.long), **{argument(model): held}).logits.sum().backward()
    assert norm.weight.grad is not None


def test_hooks_and_gradients_are_kept(tmp_path: Path) -> None:
    model, seen = compress.load(packed("llama", tmp_path), "float32"), list[str]()
    layer: Any = model.model.layers[0]
    for path in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
        layer.get_submodule(path).register_forward_hook(lambda module, given, out, path=path: seen.append(path))
    said(model, 1, tokens=1)
    assert seen == ["input_layernorm", "self_attn.q_proj", "mlp.down_proj"] * 2
    given = torch.randn(1, 1, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=given).logits.sum().backward()
    assert given.grad is not None
    assert layer.input_layernorm.weight.grad is not None


def test_signatures_are_those_of_their_own_forwards(tmp_path: Path) -> None:
    model: Any = compress.load(packed("llama", tmp_path), "float32")
    own, layers = slow(model), list(model.modules())
    for quick, module in zip(layers, own.modules(), strict=True):
        assert inspect.signature(quick.forward) == inspect.signature(module.forward)


def test_what_computes_something_else_stays_as_it_is(tmp_path: Path) -> None:
    model: Any = compress.load(packed("llama", tmp_path), "bfloat16")
    first, second = model.model.layers

    class Capped(type(second.self_attn).__mro__[2]):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            out, more = super().forward(*given, **named)
            return 0.5 * torch.tanh(out / 0.5), more

    class Bounded(type(second.mlp).__mro__[2]):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.5) * self.up_proj(x))

    class Broken(type(second.mlp).__mro__[2]):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not today")

    for module in model.modules():
        if isinstance(module, KINDS):
            module.__class__ = type(module).__mro__[2]
    second.self_attn.__class__, second.mlp.__class__, first.mlp.__class__ = Capped, Bounded, Broken
    first.input_layernorm.variance_epsilon = "unknown"
    assert quicken(model) == sum(counted(model)) == 5
    assert counted(model) == (4, 1, 0)
    assert isinstance(first.self_attn, QuickAttention)
    assert quicken(model.double()) == quicken(model.to("meta")) == 0


@pytest.mark.parametrize(("name", "taken"), [("norm", (0, 2, 2)), ("rotary", (5, 0, 2)), ("gate", (5, 2, 0))])
@pytest.mark.parametrize("training", [False, True])
def test_what_a_kernel_would_get_wrong_is_not_taken(
    name: str, taken: tuple[int, ...], training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Any = getattr(Library, name)

    def wrong(self: Library, first: torch.Tensor, *more: Any) -> Any:
        out = own(self, first, *more)
        return first.mul_(1.1) if out is None else out * 1.1

    monkeypatch.setattr(Library, name, wrong)
    model = slow(compress.load(packed("llama", tmp_path), "float32")).train(training)
    assert quicken(model) == sum(taken)
    assert counted(model) == taken
    assert all(module.training is training for module in model.modules())


def test_other_attention_is_left_alone(tmp_path: Path) -> None:
    model = slow(compress.load(packed("llama", tmp_path), "float32"))
    model.set_attn_implementation("eager")
    quicken(model)
    assert counted(model) == (5, 0, 2)


def test_a_trained_model_says_the_same(tmp_path: Path) -> None:
    source = SHARED / "models" / "tiny-llama-8m"
    if not source.is_dir():
        pytest.skip("no trained models beside this checkout")
    run(source, tmp_path / "out", "quantize.rtn(scheme=w4a16g32, ragged=channel) | pack(format=native)")
    model = compress.load(tmp_path / "out", "bfloat16")
    assert min(counted(model)) > 0
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(3))
    own = slow(model)
    texts = [
        one.generate(ids, max_new_tokens=24, do_sample=False, **{argument(one): GrowingCache(one.config)}) for one in (model, own)
    ]
    assert (texts[0] == texts[1]).float().mean() > 0.9
    assert (said(model, 2) - said(own, 2)).norm() < 2e-2 * said(own, 2).norm()
