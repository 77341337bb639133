"""Passes that make a smaller model: which parts they keep, by oracles; what follows them in a recipe; what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, CoverageError
from compress.layerwise.model import build as build_model
from compress.spec.kept import MLP, Kept
from families import build
from support import do, load, logits, ready_inputs, rows, run, tiny_llama, tree

CALIBRATE = f"calibrate(data='{ready_inputs()}', samples=6)"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of five blocks in fp32."""
    return tiny_llama(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=5, dtype="float32")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("mixtral", tmp_path_factory.mktemp("mixtral"))


def ids() -> torch.Tensor:
    return load_file(ready_inputs())["input_ids"]


def kept_of(out: Path) -> Kept:
    manifest = Manifest.read(out)
    assert manifest is not None
    assert manifest.kept is not None
    return manifest.kept


def sizes(model: torch.nn.Module) -> tuple[int, ...]:
    config = model.config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return tuple(getattr(config, name) for name in names)


def test_layers_of_least_influence_go(deep: Path, tmp_path: Path) -> None:
    do(deep, tmp_path / "out", f"{CALIBRATE} | prune.depth(layers=3)")
    with torch.no_grad():
        states = build_model(open_checkpoint(deep))(input_ids=ids(), output_hidden_states=True, use_cache=False).hidden_states
        # The last state comes after the final norm, so the last layer is looked at by itself.
        last: list[torch.Tensor] = []
        model = build_model(open_checkpoint(deep))
        model.model.layers[-1].register_forward_hook(
            lambda _, args, out: last.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        model(input_ids=ids(), use_cache=False)
    pairs = [*pairwise(states[:-1]), (states[-2], last[0])]
    influence = [1 - float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
    wanted = sorted(sorted(range(5), key=lambda layer: influence[layer])[2:])
    assert kept_of(tmp_path / "out").layers == tuple(wanted)
    source, out = open_checkpoint(deep), open_checkpoint(tmp_path / "out")
    for new, old in enumerate(wanted):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(out.read(name.format(new)), source.read(name.format(old)))
    assert sizes(load(tmp_path / "out"))[0] == 3


def test_padding_does_not_count(deep: Path, tmp_path: Path) -> None:
    """A sample's padding changes no score: neither of layers nor of neurons."""
    plain = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    padded = {name: torch.nn.functional.pad(tensor, (0, 8)) for name, tensor in plain.items()}
    for name, tensors in (("plain", plain), ("padded", padded)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
        calibrate = f"calibrate(data='{tmp_path / name}.safetensors', samples=6)"
        for pass_ in ("prune.depth(layers=3)", "prune.width(ffn=48, heads=2)"):
            do(deep, tmp_path / f"{name}-{pass_[6:11]}", f"{calibrate} | {pass_}")
    for what in ("depth", "width"):
        assert kept_of(tmp_path / f"plain-{what}") == kept_of(tmp_path / f"padded-{what}")


def test_layers_by_the_loss_without_them(deep: Path, tmp_path: Path) -> None:
    do(deep, tmp_path / "out", f"{CALIBRATE} | prune.depth(layers=4, by=loss)")
    losses = []
    for layer in range(5):
        model = build_model(open_checkpoint(deep))
        del model.model.layers[layer]
        model.config.num_hidden_layers = 4
        with torch.no_grad():
            found = model(input_ids=ids(), use_cache=False).logits[:, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(found.flatten(0, 1), ids()[:, 1:].flatten().long())))
    assert kept_of(tmp_path / "out").layers == tuple(n for n in range(5) if n != min(range(5), key=lambda n: losses[n]))


def test_contiguous_layers(deep: Path, tmp_path: Path) -> None:
    do(deep, tmp_path / "out", f"{CALIBRATE} | prune.depth(layers=3, contiguous=true)")
    dropped = sorted(set(range(5)) - set(kept_of(tmp_path / "out").layers))
    assert dropped[1] == dropped[0] + 1


def activations(model: Any, path: str) -> torch.Tensor:
    """What a module reads, [samples, tokens, width]."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids(), use_cache=False)
    hook.remove()
    return seen[0]


def test_neurons_heads_and_channels_of_small_activations_go(deep: Path, tmp_path: Path) -> None:
    do(deep, tmp_path / "out", f"{CALIBRATE} | prune.width(hidden=48, heads=2, ffn=64)")
    model, kept = build_model(open_checkpoint(deep)), kept_of(tmp_path / "out")

    def score(path: str) -> torch.Tensor:
        return (activations(model, path).abs().double().mean(1) ** 2).sum(0).sqrt()

    def top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
        return tuple(sorted(scores.argsort(descending=True)[:count].tolist()))

    hidden = torch.zeros(64, dtype=torch.float64)
    for number, block in enumerate(kept.blocks):
        layer = f"model.layers.{number}"
        assert block.units[MLP] == top(score(f"{layer}.mlp.down_proj"), 64)
        heads = score(f"{layer}.self_attn.o_proj").view(4, 16).norm(dim=1)
        # One of the two query heads of each of the two key-value heads.
        assert block.queries == tuple(group * 2 + int(heads[group * 2 : group * 2 + 2].argmax()) for group in range(2))
        hidden += score(f"{layer}.self_attn.q_proj") + score(f"{layer}.mlp.up_proj")
    assert kept.hidden == top(hidden, 48)
    assert sizes(load(tmp_path / "out")) == (5, 48, 2, 2, 64)


def test_refit_lowers_the_error_of_every_output(deep: Path, tmp_path: Path) -> None:
    for name, more in (("plain", ", refit=false"), ("refit", "")):
        do(deep, tmp_path / name, f"{CALIBRATE} | prune.width(ffn=64, kv_heads=1{more})")
    assert kept_of(tmp_path / "plain") == kept_of(tmp_path / "refit")
    model, kept = build_model(open_checkpoint(deep)), kept_of(tmp_path / "plain")
    for number, block in enumerate(kept.blocks):
        for path, inputs in (
            (f"model.layers.{number}.mlp.down_proj", list(block.units[MLP])),
            (f"model.layers.{number}.self_attn.o_proj", [q * 16 + n for q in block.queries for n in range(16)]),
        ):
            x = activations(model, path).flatten(0, 1)
            whole = x @ model.get_submodule(path).weight.detach().T
            plain, refit = (
                (whole - x[:, inputs] @ open_checkpoint(tmp_path / name).read(f"{path}.weight").float().T).norm()
                for name in ("plain", "refit")
            )
            assert refit < plain, path


def test_experts_that_add_least_go(mixtral: Path, tmp_path: Path) -> None:
    do(mixtral, tmp_path / "out", f"{CALIBRATE} | prune.experts(experts=2)")
    model, kept = build_model(open_checkpoint(mixtral)), kept_of(tmp_path / "out")
    for number, block in enumerate(kept.blocks):
        mlp = model.get_submodule(f"model.layers.{number}.mlp")
        calls: list[Any] = []
        hook = mlp.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
        with torch.no_grad():
            model(input_ids=ids(), use_cache=False)
        hook.remove()
        hidden, index, weights = calls[0]
        scores = []
        for expert in range(4):
            token, place = (index == expert).nonzero(as_tuple=True)
            gate, up = (hidden[token] @ mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
            made = (torch.nn.functional.silu(gate) * up) @ mlp.experts.down_proj[expert].T
            scores.append(float((weights[token, place] * made.norm(dim=1)).mean().detach()) if len(token) else 0.0)
        assert block.experts == tuple(sorted(sorted(range(4), key=lambda e: -scores[e])[:2]))
    smaller = load(tmp_path / "out")
    assert smaller.config.num_local_experts == 2
    do(mixtral, tmp_path / "often", f"{CALIBRATE} | prune.experts(experts=1, by=frequency)")
    assert load(tmp_path / "often").config.num_experts_per_tok == 1


def test_equal_heads_are_joined_without_loss(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", dtype="float32")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            tensor[16:] = tensor[:16]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run(source, tmp_path / "out", "prune.gqa(kv_heads=1)")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(source)))


def test_gqa_is_a_mean(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", "prune.gqa(kv_heads=1)")
    name = "model.layers.0.self_attn.v_proj.weight"
    before, after = open_checkpoint(tiny).read(name), open_checkpoint(tmp_path / "out").read(name)
    assert torch.equal(after, before.float().view(2, 16, 64).mean(0).bfloat16())


def test_sorting_changes_no_logit_and_prefixes_nest(deep: Path, mixtral: Path, tmp_path: Path) -> None:
    for name, source in (("deep", deep), ("mixtral", mixtral)):
        do(source, tmp_path / name, f"{CALIBRATE} | prune.nested(sort_hidden=true)")
        expected = logits(load(source, dtype=torch.float32))
        torch.testing.assert_close(logits(load(tmp_path / name, dtype=torch.float32)), expected, rtol=1e-4, atol=1e-4)
    nested = tmp_path / "deep"
    run(nested, tmp_path / "a", "prune.slice(ffn=80, kv_heads=1)")
    run(tmp_path / "a", tmp_path / "ab", "prune.slice(ffn=32, hidden=32)")
    run(nested, tmp_path / "b", "prune.slice(ffn=32, hidden=32, kv_heads=1)")
    assert tree(tmp_path / "ab")["model.safetensors"] == tree(tmp_path / "b")["model.safetensors"]
    # What is left of the source is told by the source's own numbers.
    assert kept_of(tmp_path / "ab") == kept_of(tmp_path / "b")
    assert kept_of(tmp_path / "ab").blocks[0].units[MLP] == kept_of(nested).blocks[0].units[MLP][:32]


def test_a_recipe_goes_on_from_the_smaller_model(deep: Path, tmp_path: Path) -> None:
    recipe = f"{CALIBRATE} | prune.depth(layers=3) | prune.width(ffn=64, refit=true) | quantize.gptq(scheme=w4a16g32) | pack"
    result = run(deep, tmp_path / "out", recipe)
    assert result.manifest.structure
    assert len(kept_of(tmp_path / "out").layers) == 3
    # The plan said every byte that was written.
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == sum(shard.nbytes for shard in result.plan.steps[-1].shards)
    model = load(tmp_path / "out")
    assert sizes(model)[0] == 3
    assert torch.isfinite(logits(model)).all()
    assert {note.what for note in result.manifest.notes} >= {"sliced"}


def test_a_smaller_student_is_compared_by_what_it_has_kept(deep: Path, tmp_path: Path) -> None:
    recipe = (
        f"{CALIBRATE} | prune.depth(layers=3) | prune.width(hidden=48) | distill.squarehead(batch=2, micro_batch=2, epochs=2)"
    )
    run(deep, tmp_path / "out", recipe)
    kept = kept_of(tmp_path / "out")
    assert (len(kept.layers), len(kept.hidden)) == (3, 48)
    first = rows(tmp_path / "out")[0]
    assert first["loss"] > 0
    assert sizes(load(tmp_path / "out"))[:2] == (3, 48)


def test_layer_types_go_along(tmp_path: Path) -> None:
    source = build("gemma2", tmp_path)
    do(source, tmp_path / "out", f"{CALIBRATE} | prune.depth(layers=1)")
    types = json.loads((source / "config.json").read_text())["layer_types"]
    layer = kept_of(tmp_path / "out").layers[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == [types[layer]]


def test_the_target_in_parameters_and_bytes_is_met(tiny: Path, tmp_path: Path) -> None:
    for name, option, most in (("count", "parameters=50K", 50_000), ("bytes", "size=100kB", 50_000)):
        run(tiny, tmp_path / name, f"{CALIBRATE} | prune.width({option}, multiple=8)")
        count = sum(parameter.numel() for parameter in load(tmp_path / name).parameters())
        assert 0.9 * most < count <= most, name


def test_a_tied_model_loses_neurons_before_channels(tmp_path: Path) -> None:
    """A head that is the embedding cannot be fitted to fewer channels."""
    source = build("tied", tmp_path)
    for name, option, expected in (("some", "parameters=52K", (64, 48)), ("more", "parameters=50K", (48, 80))):
        do(source, tmp_path / name, f"{CALIBRATE} | prune.width({option}, multiple=8)")
        _, hidden, _, _, ffn = sizes(load(tmp_path / name))
        assert (hidden, ffn) == expected


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("calibrate | prune.depth(layers=2)", "the model has 2"),
        ("calibrate | prune.width(ffn=97)", "units of 97, and the model has 96"),
        ("calibrate | prune.width(heads=3)", "3 query heads for 2 key-value heads"),
        ("calibrate | prune.width(expert_ffn=8)", "the model has no such part"),
        ("calibrate | prune.width(parameters=1G)", "a number such as 100M"),
        ("calibrate | prune.width(parameters=1M)", "choose a smaller target"),
        ("calibrate | prune.width(parameters=10)", "choose a larger target"),
        ("calibrate | prune.width(ffn=8, parameters=10K)", "give widths"),
        ("calibrate | prune.experts(experts=1)", "no routed experts"),
        ("prune.gqa(kv_heads=2)", "choose a number that divides it"),
        ("prune.slice", "give the sizes"),
        ("prune.width(ffn=8)", "calibrat"),
        ("quantize.rtn(scheme=w4a16g32) | prune.slice(ffn=32)", "cut first"),
        ("prune.magnitude(sparsity=2:4) | prune.slice(ffn=32)", "cut first"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_bytes_move(recipe: str, message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError) as error:
        run(tiny, tmp_path / "out", recipe.replace("calibrate", CALIBRATE))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "recipe", "message"),
    [
        ("bloom", "prune.slice(layers=1)", "model_type 'bloom'"),
        ("gpt2", "prune.slice(kv_heads=2)", "transformers builds another model"),
        ("gpt2", "prune.gqa(kv_heads=2)", "cannot be fewer"),
        ("deepseek_v3", "prune.slice(layers=2)", "layer 1 has other tensors than layer 0"),
    ],
)
def test_what_a_family_cannot_say_is_refused(family: str, recipe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match=message):
        run(build(family, tmp_path), tmp_path / "out", recipe)
