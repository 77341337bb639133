"""quantize.rotate: the function is kept, what cannot be rotated is refused by name, outliers are spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, InputError, RecipeError
from compress.executors import rotate as executor
from compress.pipeline.resolve import resolve
from compress.spec.recipe import parse_one_liner
from families import Family, build
from support import (
    do,
    kl,
    load,
    logits,
    ready_inputs,
    refused,
    rows,
    run,
    step_of,
    stop_at_record,
    tensors,
    tiny_llama,
)

families.FAMILIES.setdefault("gemma", Family("gemma", 2 * 7, {"head_dim": 16}))
ROTATE, TOKENS = "quantize.rotate(untie=true)", f"calibrate(data='{ready_inputs()}', samples=6)"
ROTATED = (
    "llama", "tied", "mistral", "head_dim", "qwen2", "qwen3", "granite", "gemma", "phi3", "mixtral", "qwen2_moe", "qwen3_moe",
    "olmoe", "gpt_oss",
)  # fmt: skip
MEANS, POST = "LayerNorm, which subtracts the mean of all channels", "layernorm, whose gain is for channels of what is added"
UNKNOWN = "what reads and writes its residual stream is not in the table"
NOT_KEPT = {
    **dict.fromkeys(("gpt2", "gpt_neox", "opt", "bloom", "falcon", "stablelm", "starcoder2", "cohere"), MEANS),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "glm4"), POST),
    **dict.fromkeys(("t5", "llava", "deepseek_v3"), UNKNOWN),
}


def in_fp32(name: str, folder: Path) -> Path:
    """A family's tiny model in fp32, where what is left of a difference is rounding."""
    load(build(name, folder)).float().save_pretrained(folder / f"{name}-fp32")
    return folder / f"{name}-fp32"


def alike(source: Path, out: Path) -> bool:
    """Whether two models in fp32 have the same logits but for rounding."""
    wanted = logits(load(source))
    return float((logits(load(out)) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ROTATED)
def test_function_is_kept(name: str, tmp_path: Path) -> None:
    """Every tensor that is noted has changed and no other, no gain is left, and the plan knew each byte."""
    source = in_fp32(name, tmp_path)
    result = do(source, tmp_path / "out", ROTATE)
    assert alike(source, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    noted = {weight for note in result.manifest.notes if note.what == "rotated" for weight in note.names}
    assert {weight for weight in after if weight not in before or not torch.equal(before[weight], after[weight])} == noted
    norms = [w.name for w in result.plan.weights if w.kind == "norm" and w.name in noted]
    assert len(norms) == 2 * 2 + 1
    assert all(torch.equal(after[norm], torch.full_like(after[norm], 0.0 if name == "gemma" else 1.0)) for norm in norms)
    step = result.plan.steps[-1]
    assert step.payload_bytes == sum(tensor.nbytes for tensor in after.values())
    files = [*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out" / "config.json"]
    assert step.disk_bytes == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "opt"])
def test_values_alone_can_be_rotated_in_more_families(name: str, tmp_path: Path) -> None:
    source = in_fp32(name, tmp_path)
    do(source, tmp_path / "out", "quantize.rotate(r1=false)")
    assert alike(source, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = {weight.split(".")[-2] for weight in before if not torch.equal(before[weight], after[weight])}
    assert changed == {"gpt2": {"c_attn", "c_proj"}, "opt": {"v_proj", "out_proj"}}.get(name, {"v_proj", "o_proj"})


@pytest.mark.parametrize("kind", ["hadamard", "block", "orthogonal"])
def test_each_kind_keeps_it_at_sizes_that_are_no_power_of_two(kind: str, tmp_path: Path) -> None:
    """96 = 12 x 8 channels in heads of 12; blocks have 32 and 4. Biases that write into the stream are rotated as well."""
    sizes = {"hidden_size": 96, "num_attention_heads": 8, "head_dim": 12, "attention_bias": True, "mlp_bias": True}
    source = tiny_llama(tmp_path / "in", dtype="float32", **sizes)
    held = load_file(source / "model.safetensors")
    chance = torch.Generator().manual_seed(0)
    held = {name: torch.randn(w.shape, generator=chance) / 8 if name.endswith("bias") else w for name, w in held.items()}
    save_file(held, source / "model.safetensors", {"format": "pt"})
    result = do(source, tmp_path / "out", f"quantize.rotate(kind={kind})")
    assert alike(source, tmp_path / "out")
    said = {"hadamard": "Hadamard 96 = 12 x 8", "block": "Hadamard 32 in 3 blocks", "orthogonal": "random orthogonal 96"}
    assert any(said[kind] in note.reason for note in result.manifest.notes)
    other = do(source, tmp_path / "other", f"quantize.rotate(kind={kind})", seed=1)
    assert other.manifest.fingerprint != result.manifest.fingerprint


@pytest.mark.parametrize("name", NOT_KEPT)
def test_families_whose_function_would_change_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = families.FAMILIES[name].model_type
    refused(
        build(name, tmp_path), tmp_path / "out", "quantize.rotate", (f"model_type '{model}'", NOT_KEPT[name], "quantize without")
    )


def test_a_tied_head_is_refused_and_untied_if_asked(tmp_path: Path) -> None:
    source = in_fp32("tied", tmp_path)
    more = 128 * 64 * 4
    refused(
        source,
        tmp_path / "no",
        "quantize.rotate",
        ("a head that takes the last norm's gain", f"untie=true, for {more:,} bytes more"),
    )
    result = do(source, tmp_path / "out", f"{ROTATE} | quantize.rtn(scheme=w8a16, targets=[linear, head]) | pack(format=native)")
    (note,) = [note for note in result.manifest.notes if note.what == "untied"]
    assert (note.names, f"{more:,} bytes more" in note.reason) == (("lm_head.weight",), True)
    turned = step_of(tmp_path / "out", "quantize.rotate")
    assert json.loads((turned / "config.json").read_text())["tie_word_embeddings"] is False
    assert result.plan.steps[0].payload_bytes == sum(ref.nbytes for ref in open_checkpoint(source).refs.values()) + more
    import compress

    wanted, got = logits(load(source)), logits(compress.load(tmp_path / "out"))
    assert float((got - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_head_that_is_stored_twice_is_one(tmp_path: Path) -> None:
    """Where both are on disk and equal, the head is made anew; where they differ, nothing tells which is meant."""
    source = in_fp32("tied", tmp_path)
    held = load_file(source / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, source / "model.safetensors", {"format": "pt"})
    result = do(source, tmp_path / "out", ROTATE)
    assert alike(source, tmp_path / "out")
    assert not any(note.what == "tied" for note in result.manifest.notes)
    held["lm_head.weight"] *= 2
    save_file(held, source / "model.safetensors", {"format": "pt"})
    refused(
        source,
        tmp_path / "no",
        ROTATE,
        ("'lm_head.weight'", "another tensor than model.embed_tokens.weight", "tie_word_embeddings"),
    )


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (f"quantize.rtn(scheme=w4a16g16) | {ROTATE}", ("codes cannot be rotated", "rotate before quantizing")),
        (f"prune.magnitude(sparsity=0.5) | {ROTATE}", ("a rotation would fill its zeros", "rotate before pruning")),
    ],
)
def test_what_is_quantized_or_masked_is_refused(recipe: str, said: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    refused(tiny, tmp_path / "out", recipe, said)
    one = recipe.replace(") |", ", targets=['re:.*layers.0.*q_proj']) |")
    with pytest.raises(CompressError, match=r"(?s)--allow-skips.*a rotation of all that touches the residual stream"):
        run(tiny, tmp_path / "out", one, allow_skips=("q_proj",))


@pytest.mark.parametrize(
    ("options", "reason"), [("r1=false, r2=false", "at least one of them"), ("r1=false, untie=true", "untie: only with r1")]
)
def test_options_that_do_not_fit_are_refused(options: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        resolve(parse_one_liner(f"quantize.rotate({options})"))


def test_values_that_are_clipped_are_refused(tmp_path: Path) -> None:
    source = build("olmoe", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "clip_qkv": 8.0}))
    refused(source, tmp_path / "out", ROTATE, ("values that nothing clips", "clip_qkv 8.0", "give r2=false"))
    do(source, tmp_path / "out", "quantize.rotate(untie=true, r2=false)")


def test_numbers_that_the_dtype_cannot_hold_are_told(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "in", dtype="float16")
    held = load_file(source / "model.safetensors")
    held["model.layers.0.mlp.down_proj.weight"].fill_(60000.0)
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"(?s)layers.0.mlp.down_proj.weight', rotated.*F16 can hold.*an overflow.*bfloat16"):
        do(source, tmp_path / "out", "quantize.rotate")


def test_a_run_that_was_killed_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    do(tiny, tmp_path / "whole", "quantize.rotate")
    stop_at_record(monkeypatch, "quantize.rotate", 9)
    with pytest.raises(KeyboardInterrupt):
        do(tiny, tmp_path / "again", "quantize.rotate", threads=1)
    result = do(tiny, tmp_path / "again", "quantize.rotate")
    whole = tensors(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in tensors(result.out).items())


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "phi3"])
def test_pieces_make_the_same_tensor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is never in float64 as a whole."""
    source = build(name, tmp_path)
    do(source, tmp_path / "whole", ROTATE)
    monkeypatch.setattr(executor, "PIECE_BYTES", 8 * 64 * 24)
    do(source, tmp_path / "pieces", ROTATE)
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    assert all(torch.equal(whole[weight], pieces[weight]) for weight in whole)


@pytest.fixture(scope="module")
def rough(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with four channels of what norms put out 30 times as large, read with weights as much smaller."""
    folder = tmp_path_factory.mktemp("rough") / "model"
    folder.mkdir()
    for file in demo_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    held = load_file(demo_model / "model.safetensors")
    for name in list(held):
        if name.endswith("layernorm.weight"):
            block, first = name.rsplit(".", 2)[0], "input" in name
            held[name] = held[name].index_fill(0, torch.arange(4), 0) + held[name] * 30 * (torch.arange(len(held[name])) < 4)
            for reader in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if first else ("mlp.gate_proj", "mlp.up_proj")
            ):
                held[f"{block}.{reader}.weight"][:, :4] /= 30
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def peaks(folder: Path) -> float:
    """The largest entry of what the queries of a middle block read, as a multiple of its root mean square, over tokens."""
    seen: list[torch.Tensor] = []
    model = load(folder)
    module: Any = model.get_submodule("model.layers.2.self_attn.q_proj")
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].float()))
    logits(model, 64)
    return float((seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).mean())


def test_planted_outliers_are_spread_and_weights_round_better(rough: Path, tmp_path: Path) -> None:
    """QuaRot's property: what is read has no channel that stands out, and 4 bits per row are enough again."""
    do(rough, tmp_path / "turned", "quantize.rotate(untie=true) | quantize.rtn(scheme=w4a16)")
    assert peaks(rough) > 2 * peaks(step_of(tmp_path / "turned", "quantize.rotate"))
    do(rough, tmp_path / "rough", "quantize.rtn(scheme=w4a16)")
    assert kl(rough, tmp_path / "turned") < 0.5 * kl(rough, tmp_path / "rough")


TEACH = "epochs=1, batch=2, micro_batch=2"


def test_hidden_states_are_compared_with_those_of_the_rotated_model(tiny: Path, tmp_path: Path) -> None:
    """A student that is only rotated has no error; a teacher that is not rotated is refused."""
    do(tiny, tmp_path / "out", f"{TOKENS} | quantize.rotate | distill.squarehead({TEACH})")
    assert rows(tmp_path / "out")[0]["squarehead"] == 0
    for trained in ("distill.squarehead", "distill.features", "distill.blocks"):
        with pytest.raises(InputError, match=r"(?s)residual stream that is rotated as the student's is.*distill.logits"):
            do(tiny, tmp_path / "no", f"{TOKENS} | quantize.rotate | {trained}({TEACH}, teacher='{tiny}')")
    do(tiny, tmp_path / "blocks", f"{TOKENS} | quantize.rotate | quantize.rtn(scheme=w4a16g16) | quantize.learned({TEACH})")


def test_factors_are_made_of_the_rotated_weights(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "codes", "quantize.rotate | quantize.rtn(scheme=w2a16g16)")
    with pytest.raises(InputError, match=r"(?s)quantize.lorc.dense.*before quantize.rotate.*name the output of quantize.rotate"):
        do(tmp_path / "codes", tmp_path / "no", f"quantize.lorc(rank=4, dense='{tiny}')")
    turned = step_of(tmp_path / "codes", "quantize.rotate")
    do(tmp_path / "codes", tmp_path / "out", f"quantize.lorc(rank=4, dense='{turned}')")
