"""The refit of prune.width: exact where nothing is lost, nearer to the source for every family, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.layerwise.model import build as build_model
from compress.numerics.output_fit import NormScale
from compress.spec.kept import MLP, Kept
from families import build
from support import CALIBRATE, do, kl, load, logits, ready_inputs, run, tiny_llama

READY = f"calibrate(data='{ready_inputs()}', samples=6)"
FAMILIES = {
    # Linears turned, LayerNorm; norms that multiply by 1 + w, behind attention too; norms over all heads; experts, stacked or not.
    "gpt2": "hidden=48, heads=3, kv_heads=3, ffn=64", "gemma2": "hidden=48, ffn=64", "olmo2": "hidden=48, heads=2", "phi3": "hidden=40, ffn=64",
    "gpt_neox": "hidden=48, heads=3, kv_heads=3", "mixtral": "hidden=48, expert_ffn=64", "qwen2_moe": "hidden=48, expert_ffn=16", "gpt_oss": "hidden=48, expert_ffn=64",
}  # fmt: skip


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=3, dtype="float32")


def readings(model: Any, path: str) -> torch.Tensor:
    """What a module reads of the calibration tokens [tokens, width]."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=load_file(ready_inputs())["input_ids"], use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1)


def kept_of(out: Path) -> Kept:
    manifest = Manifest.read(out)
    assert manifest is not None
    assert manifest.kept is not None
    return manifest.kept


def test_channels_that_repeat_others_cost_nothing(deep: Path, tmp_path: Path) -> None:
    """Half of the stream is a copy of the other half, so the smaller model computes what the larger one does."""
    tensors = load_file(deep / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor[:, 32:] = tensor[:, :32]
        elif "o_proj" in name or "down_proj" in name:
            tensor[32:] = tensor[:32]
        elif "norm" in name:
            # The copies are read less, so it is they that are left out.
            tensor[32:] = 0.01
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((deep / "config.json").read_bytes())
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    wanted = logits(load(source))
    errors = []
    for name, more in (("plain", ", refit=false"), ("refit", "")):
        do(source, tmp_path / name, f"{READY} | prune.width(hidden=32{more})")
        assert kept_of(tmp_path / name).hidden == tuple(range(32))
        errors.append(float((logits(load(tmp_path / name)) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.002 < errors[0]


def test_every_reader_is_least_squares_and_every_norm_keeps_its_scale(deep: Path, tmp_path: Path) -> None:
    do(deep, tmp_path / "out", f"{READY} | prune.width(hidden=40, ffn=64)")
    model, kept, out = build_model(open_checkpoint(deep)), kept_of(tmp_path / "out"), open_checkpoint(tmp_path / "out")
    hidden = list(kept.hidden)
    rows = {"up_proj": list(kept.blocks[1].units[MLP]), "q_proj": slice(None), "lm_head": slice(None)}
    for path in ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"):
        x, w = readings(model, path).double(), model.get_submodule(path).weight.detach()[rows[path.rpartition(".")[2]]].double()
        oracle = torch.linalg.lstsq(x[:, hidden], x @ w.T).solution.T
        found, plain = out.read(f"{path}.weight").double(), w[:, hidden]
        errors = [float((x @ w.T - x[:, hidden] @ each.T).norm()) for each in (oracle, found, plain)]
        assert errors[0] <= errors[1] < 1.01 * errors[0] < errors[2], path
    for path in ("model.layers.1.input_layernorm", "model.layers.2.post_attention_layernorm", "model.norm"):
        x, w = readings(model, path), model.get_submodule(path).weight.detach()
        scale = (x[:, hidden].square().mean(1).sqrt() / x.square().mean(1).sqrt()).mean()
        torch.testing.assert_close(out.read(f"{path}.weight"), w[hidden] * scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_the_scale_of_a_norm_is_the_best_one(centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, kept = torch.randn(300, 12, generator=generator) + 0.5, torch.tensor([0, 3, 4, 9])
    scale = NormScale(kept, centred)
    scale.add(x[:100])
    scale.add(x[100:])

    def normed(rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        spread = of.std(1, correction=0, keepdim=True) if centred else of.square().mean(1, keepdim=True).sqrt()
        return rows / spread

    own = x[:, kept] - x[:, kept].mean(1, keepdim=True) if centred else x[:, kept]
    small, whole = normed(own, x[:, kept]), normed(own, x)
    assert scale.mean() == pytest.approx(float((small * whole).sum() / small.square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_comes_nearer_to_the_source(name: str, tmp_path: Path) -> None:
    source = build(name, tmp_path)
    wanted, errors = logits(load(source, dtype=torch.float32)), []
    for number, more in enumerate((", refit=false", "")):
        do(source, tmp_path / str(number), f"{READY} | prune.width({FAMILIES[name]}{more})")
        errors.append(float((logits(load(tmp_path / str(number), dtype=torch.float32)) - wanted).norm() / wanted.norm()))
    assert kept_of(tmp_path / "0") == kept_of(tmp_path / "1")
    assert errors[1] < errors[0], errors


@pytest.mark.slow
def test_trained_weights_lose_less(demo_model: Path, tmp_path: Path) -> None:
    """By the KL to the source; the head is tied to the embedding, so it stays as it is."""
    for options, most in (("hidden=96", 0.85), ("ffn=256", 0.6)):
        found = []
        for number, more in enumerate((", refit=false", "")):
            out = tmp_path / f"{options}-{number}"
            run(demo_model, out, f"{CALIBRATE} | prune.width({options}{more})")
            found.append(kl(demo_model, out))
        assert found[1] < most * found[0], (options, found)
