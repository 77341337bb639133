"""One slicer for every family: the masked model computes what the smaller model computes, for masks of 0 and 1 and in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.architecture.axes import rescaled, slices
from compress.architecture.sizes import resized_config, sizes_of
from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.errors import Refusal
from compress.layerwise.masked_model import MaskedModel, Masks
from compress.layerwise.model import build as build_model
from compress.spec.kept import MLP, Kept, KeptBlock, Sizes
from families import build
from support import load, logits

ALL = ("layers", "hidden", "groups", "units", "experts")
FAMILIES = {
    **dict.fromkeys(("llama", "tied", "head_dim", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "glm4", "granite"), ALL),
    **dict.fromkeys(("starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), ALL),
    **dict.fromkeys(("gpt2", "opt"), ALL),
    "olmo2": ("layers", "hidden", "units"),
    "stablelm": ("layers", "units"),
    "olmoe": ("layers", "experts"),
}
"""Families, and what can be cut out of each: the rest their configs cannot say."""
JOINED = ("gpt2", "opt")
"""Families whose heads have hidden / heads channels."""


def smaller(name: str, sizes: Sizes) -> Sizes:
    """Sizes of which every part that can be cut is cut."""
    cut = FAMILIES[name]
    after = replace(
        sizes, layers=1, hidden=(32 if name in JOINED else 48) if "hidden" in cut else sizes.hidden,
        units=sizes.units and 64 if "units" in cut else sizes.units, experts=sizes.experts and 3,
    )  # fmt: skip
    if "groups" in cut:
        after = replace(after, groups=sizes.groups // 2, queries=sizes.queries // 2)
    return after


def choose(before: Sizes, after: Sizes) -> Kept:
    """Parts at random."""
    generator = torch.Generator().manual_seed(1)

    def some(total: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    layers, hidden, blocks = some(before.layers, after.layers), some(before.hidden, after.hidden), []
    for _ in layers:
        groups, experts = some(before.groups, after.groups), some(before.experts, after.experts)
        queries = tuple(group * before.share + n for group in groups for n in range(before.share))
        units = {n: u for n, u in Kept.first(after, before).blocks[0].units.items() if not n.isdigit()}
        if before.units:
            units[MLP] = some(before.units, after.units)
        units |= {str(expert): tuple(range(before.expert_units)) for expert in experts}
        blocks.append(KeptBlock(groups, queries, units, experts))
    return Kept(layers, hidden, tuple(blocks))


def masks_of(kept: Kept, before: Sizes, after: Sizes, soft: bool) -> Masks:
    generator = torch.Generator().manual_seed(2)

    def row(total: int, numbers: tuple[int, ...]) -> torch.Tensor:
        z = torch.zeros(total)
        z[list(numbers)] = torch.rand(len(numbers), generator=generator) * 0.8 + 0.2 if soft else 1.0
        return z

    def rows(total: int, of: Any) -> torch.Tensor:
        z = torch.zeros(before.layers, total)
        for layer, block in zip(kept.layers, kept.blocks, strict=True):
            z[layer] = row(total, of(block))
        return z

    made = {
        "layers": lambda: row(before.layers, kept.layers),
        "hidden": lambda: row(before.hidden, kept.hidden),
        "groups": lambda: rows(before.groups, lambda block: block.groups),
        "units": lambda: rows(before.units, lambda block: block.units[MLP]),
        "experts": lambda: rows(before.experts, lambda block: block.experts),
    }
    return Masks(**{name: make() for name, make in made.items() if getattr(before, name) != getattr(after, name)})


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_sliced(name: str, soft: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build(name, tmp_path))
    model, before = resolve(checkpoint), sizes_of(checkpoint)
    after = smaller(name, before)
    kept = choose(before, after)
    masks = masks_of(kept, before, after, soft)
    whole = build_model(checkpoint)
    hooked = MaskedModel(whole, model.weights, model.family, before, frozenset(FAMILIES[name]))
    plain = logits(whole)
    hooked.masks = masks
    expected = logits(whole)
    assert not torch.allclose(plain, expected, atol=1e-2), "masks change something"
    hooked.close()
    torch.testing.assert_close(logits(whole), plain, msg="hooks are gone")
    tied = not any(weight.kind == "head" for weight in model.weights)
    tensors = {}
    weights = [weight for weight in model.weights if weight.module]
    for part in slices(weights, model.family, kept.layers, [block.experts for block in kept.blocks]):
        folded = hooked.folded(checkpoint.read(part.source.name), replace(part, layer=part.source.block), masks)
        tensors[part.name] = rescaled(part.cut(folded, kept, before), part, model.family, before, after, tied).contiguous()
    out = tmp_path / "smaller"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = {**resized_config(checkpoint.config, before, after, kept.layers), "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    # Loads with every tensor, none missing, none of another shape.
    got = logits(load(out))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_norms_average_over_kept_channels(tiny: Path) -> None:
    """Over all channels, with zeros, the output would be larger by the root of their ratio."""
    checkpoint = open_checkpoint(tiny)
    model, sizes = resolve(checkpoint), sizes_of(checkpoint)
    whole = build_model(checkpoint)
    hooked = MaskedModel(whole, model.weights, model.family, sizes, frozenset(("hidden",)))
    z = torch.ones(sizes.hidden)
    z[40:] = 0
    hooked.masks = Masks(hidden=z)
    x = torch.randn(3, sizes.hidden) * z
    got = whole.model.norm(x)
    hooked.close()
    over_all = whole.model.norm(x) * z
    torch.testing.assert_close(over_all[:, :40] / got[:, :40], torch.full((3, 40), (64 / 40) ** 0.5), rtol=1e-4, atol=0)


def test_what_no_table_knows_is_refused(tmp_path: Path) -> None:
    model = resolve(open_checkpoint(build("bloom", tmp_path)))
    with pytest.raises(Refusal, match="model_type 'bloom'"):
        slices(model.weights, model.family, [0], [()])
