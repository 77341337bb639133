"""quantize.smooth: the function is kept, what cannot be is counted, rough weights round as well as smooth ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.architecture.families import layout
from compress.architecture.weight_map import resolve as resolve_names
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CoverageError, InputError, RecipeError
from compress.executors import smooth as fold
from compress.pipeline.resolve import resolve
from compress.spec.recipe import parse_one_liner
from families import EXPERTS, build
from support import CALIBRATE, do, kl, load, logits, ready_inputs, run, shared, tiny_llama, tree

TOKENS = f"calibrate(data='{ready_inputs()}', samples=6)"
AWQ = "quantize.smooth(scheme=w3a16g16, ragged=divide)"
LEFT = {
    "gpt2": {"a GELU between its writer and it does not scale along": 2},
    "gpt_neox": {
        "its values are written between queries and keys, head by head": 2,
        "a GELU between its writer and it does not scale along": 2,
    },
    "gpt_oss": {"clamps and a one added to up do not scale along": 2},
}
"""What each family has that cannot be rescaled; nothing where it is not named."""
KNOWN = (
    "llama", "mistral", "head_dim", "qwen2", "qwen3", "granite", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss",
)  # fmt: skip


def in_fp32(name: str, folder: Path) -> Path:
    """A family's tiny model in fp32, where what is left of a difference is rounding."""
    load(build(name, folder)).float().save_pretrained(folder / f"{name}-fp32")
    return folder / f"{name}-fp32"


def reasons(manifest: Manifest) -> dict[str, int]:
    return {note.reason: note.count for note in manifest.notes if note.what == "not smoothed"}


@pytest.mark.parametrize("name", shared([*KNOWN]))
def test_function_is_kept(name: str, tmp_path: Path) -> None:
    """Logits in fp32 differ by rounding only, though every norm and linear of the table has changed."""
    source = in_fp32(name, tmp_path)
    wanted = logits(load(source))
    for number, smooth in enumerate((AWQ, "quantize.smooth(method=smoothquant)")):
        result = do(source, tmp_path / f"out-{number}", f"{TOKENS} | {smooth}")
        assert float((logits(load(result.out)) - wanted).abs().max()) < 4e-6 * float(wanted.abs().max()) + 4e-6
        assert reasons(result.manifest) == LEFT.get(name, {})
    before, after = load_file(source / "model.safetensors"), load_file(result.out / "model.safetensors")
    (note,) = [note for note in result.manifest.notes if note.what == "smoothed"]
    assert {weight for weight in before if not torch.equal(before[weight], after[weight])} == set(note.names)


def test_weights_that_one_writer_repeats_share_their_numbers(tmp_path: Path) -> None:
    """Two heads of queries read one of values: what o_proj's columns were multiplied by is the same for both."""
    source = in_fp32("llama", tmp_path)
    do(source, tmp_path / "out", f"{TOKENS} | quantize.smooth(method=smoothquant, targets=['re:.*o_proj'])")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    o, v = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    factors = (after[o] / before[o]).median(0).values.view(2, 2, 16)
    torch.testing.assert_close(factors[:, 0], factors[:, 1])
    torch.testing.assert_close(after[v] * factors[:, 0].reshape(-1, 1), before[v])


@pytest.fixture(scope="module")
def rough(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with channels of very different sizes: the same function, hard to round."""
    folder = tmp_path_factory.mktemp("rough") / "model"
    folder.mkdir()
    for file in demo_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, tensors = resolve_names(open_checkpoint(demo_model)).weights, load_file(demo_model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    names = frozenset(weight.name for weight in weights)
    for space in layout(weights, "llama", open_checkpoint(demo_model).config, names).spaces:
        if space.how == "norm":
            s = torch.randn(space.width, generator=generator).exp()
            tensors[space.writer.name] = (tensors[space.writer.name] / s).to(tensors[space.writer.name].dtype)
            for reader in space.readers:
                tensors[reader.name] = (tensors[reader.name] * s).to(tensors[reader.name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "smooth",
    [
        "quantize.smooth(scheme=w4a16)",
        pytest.param("quantize.smooth(method=smoothquant)", marks=pytest.mark.slow),
    ],
)
def test_rough_weights_round_almost_as_well_as_smooth_ones(smooth: str, rough: Path, demo_model: Path, tmp_path: Path) -> None:
    do(demo_model, tmp_path / "even", "quantize.rtn(scheme=w4a16)")
    do(rough, tmp_path / "rough", "quantize.rtn(scheme=w4a16)")
    do(rough, tmp_path / "smooth", f"{CALIBRATE} | {smooth} | quantize.rtn(scheme=w4a16)")
    even, spoilt, mended = kl(demo_model, tmp_path / "even"), kl(rough, tmp_path / "rough"), kl(rough, tmp_path / "smooth")
    assert spoilt > 5 * even
    assert mended < 1.5 * even


@pytest.mark.slow
def test_gptq_is_helped_as_well(rough: Path, tmp_path: Path) -> None:
    do(rough, tmp_path / "gptq", f"{CALIBRATE} | quantize.gptq(scheme=w3a16)")
    do(rough, tmp_path / "both", f"{CALIBRATE} | quantize.smooth(scheme=w3a16) | quantize.gptq(scheme=w3a16)")
    assert kl(rough, tmp_path / "both") < 0.5 * kl(rough, tmp_path / "gptq")


def test_norms_are_followed_as_they_are_stored(tmp_path: Path) -> None:
    """In bf16, Gemma's 1 + w loses bits when w nears -1; its readers make up for what was really stored."""
    source = build("gemma2", tmp_path)
    do(source, tmp_path / "out", f"{TOKENS} | quantize.smooth(method=smoothquant, alpha=0.9)")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    norm, reader = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    kept = (1 + after[norm].float()) * after[reader].float()
    torch.testing.assert_close(kept, (1 + before[norm].float()) * before[reader].float(), rtol=2**-8, atol=1e-7)


def test_only_what_is_targeted_is_rescaled(tiny: Path, tmp_path: Path) -> None:
    smooth = "quantize.smooth(method=smoothquant, targets=[attention], skip=['re:.*o_proj'])"
    result = do(tiny, tmp_path / "out", f"{TOKENS} | {smooth}")
    (note,) = [note for note in result.manifest.notes if note.what == "smoothed"]
    assert {name.split(".", 3)[3] for name in note.names} == {
        "input_layernorm.weight", *(f"self_attn.{word}_proj.weight" for word in "qkv")
    }  # fmt: skip


def test_experts_without_tokens_stay_as_they_are_and_are_counted(tmp_path: Path) -> None:
    source = in_fp32("mixtral", tmp_path)
    tokens = f"calibrate(data='{ready_inputs(1, 3)}', samples=1)"
    result = do(source, tmp_path / "out", f"{tokens} | quantize.smooth(method=smoothquant, targets=['re:.*w2'])")
    (note,) = [note for note in result.manifest.notes if note.what == "unrouted"]
    assert 0 < note.count < 2 * EXPERTS
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in before if name.endswith("w2.weight") and torch.equal(before[name], after[name])} == set(note.names)


def test_a_run_that_was_killed_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = f"{TOKENS} | {AWQ}"
    do(tiny, tmp_path / "whole", recipe)
    put, left = fold.SmoothingSweep.put, [13]

    def fail(self: fold.SmoothingSweep, weight: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        put(self, weight)

    monkeypatch.setattr(fold.SmoothingSweep, "put", fail)
    with pytest.raises(KeyboardInterrupt):
        do(tiny, tmp_path / "again", recipe)
    monkeypatch.undo()
    do(tiny, tmp_path / "again", recipe)
    assert tree(tmp_path / "again")["model.safetensors"] == tree(tmp_path / "whole")["model.safetensors"]


def test_another_reader_of_a_space_is_found_out(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that forgets a reader would change the function."""
    from compress.architecture import families

    wrong = tuple(rule._replace(readers=rule.readers[:-1]) for rule in families._FAMILIES["llama"])
    monkeypatch.setitem(families._FAMILIES, "llama", tuple(rule for rule in wrong if rule.readers))
    with pytest.raises(CoverageError, match=r"(?s)v_proj.*and by nothing else.*another reader of it"):
        do(tiny, tmp_path / "out", f"{TOKENS} | {AWQ}")
    assert not (tmp_path / "out").exists()


def test_families_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)model_type 'bloom'.*llama.*not in the table"):
        do(build("bloom", tmp_path), tmp_path / "out", f"{TOKENS} | {AWQ}")


def test_codes_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="smooth before quantizing"):
        do(tiny, tmp_path / "out", f"{TOKENS} | quantize.rtn(scheme=w4a16g16) | {AWQ}")


def test_what_shares_a_space_with_something_skipped_is_left(tiny: Path, tmp_path: Path) -> None:
    """With a weight in codes that --allow-skips lets pass, its whole space stays as it is, and is counted."""
    recipe = f"{TOKENS} | quantize.rtn(scheme=w4a16g16, targets=['re:.*layers.0.*q_proj']) | quantize.smooth(method=smoothquant)"
    result = run(tiny, tmp_path / "out", recipe, allow_skips=("q_proj",))
    (count,) = [count for reason, count in reasons(result.manifest).items() if "shares its space" in reason]
    assert count == 2  # k_proj and v_proj of block 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "the one that will follow"),
        ("scheme=w4a16, alpha=0.3", "alpha: not with method=awq"),
        ("method=smoothquant, scheme=w4a16", "scheme: not with method=smoothquant"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        resolve(parse_one_liner(f"quantize.smooth({options})"))


def test_groups_that_will_not_divide_are_told_before(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "odd", intermediate_size=72)
    with pytest.raises(CoverageError, match="groups of 16 do not divide 72 columns"):
        do(source, tmp_path / "out", f"{TOKENS} | quantize.smooth(scheme=w4a16g16)")
