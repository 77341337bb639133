"""Every family, end to end: what a human counts is quantized, and transformers reads back exactly what the codes mean."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import load as load_native
from compress.architecture import left_alone
from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, CoverageError, FormatError
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build as model_of_codes
from compress.pipeline.output_paths import steps_folder
from compress.pipeline.run import Result
from families import FAMILIES, RECENT, build
from forked import compress
from support import dense_meaning, load, logits, ready_inputs, run, shared

EXPANDED = {
    "gpt2": "Conv1D",
    "falcon": "initialisation asks for this weight",
    "mamba2": "initialisation asks for this weight",
    "t5": "initialisation asks for this weight",
}
"""Families that the reader takes only with `dequantize=true`, and why it does not take them otherwise."""
LONE_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
FUSED_EXPERTS = ("gpt_oss", "llama4", "granitemoe")
HELD_IN_PART = ("gte", "olmo_hybrid", *FUSED_EXPERTS)
Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The directory of a family's model, made at its first use."""
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build(name, folder)


def dense_view(result: Result, target: Path) -> Path:
    """The dense checkpoint that the last step before pack means."""
    step = result.plan.steps[-2]
    canonical = next(steps_folder(result.out).glob(f"{step.number}-{step.name}-*"))
    return dense_meaning(canonical, target)


def check_reader(model: Path, recipe: str, folder: Path) -> Result:
    """Runs `recipe`; transformers' logits of the artifact must be those of its meaning, and not those of the source."""
    result = run(model, folder / "out", recipe)
    got, meant = logits(load(result.out)), logits(load(dense_view(result, folder / "dense_view")))
    assert torch.equal(got, meant), f"off by {(got - meant).abs().max()}"
    assert not torch.equal(got, logits(load(model)))
    return result


def refused(model: Path, recipe: str, folder: Path, reason: str, kind: type[CompressError] = FormatError) -> str:
    """The text of the error that `recipe` ends in; nothing may be published."""
    with pytest.raises(kind, match=reason) as error:
        run(model, folder / "refused", recipe)
    assert not (folder / "refused").exists()
    return str(error.value)


@pytest.mark.parametrize("name", FAMILIES | RECENT)
def test_linears_are_those_a_human_counts(name: str, source: Source) -> None:
    weights, family = resolve(open_checkpoint(source(name))).weights, (FAMILIES | RECENT)[name]
    linears = [w for w in weights if w.kind in ("linear", "expert") and w.block is not None and not w.stack.startswith("tower:")]
    assert len(linears) == family.linears
    assert sum(bool(w.left_alone) for w in linears) == family.left
    assert not [w.name for w in weights if w.unclear and not w.left_alone]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in HELD_IN_PART])
def test_reader_loads_what_was_meant(name: str, source: Source, tmp_path: Path) -> None:
    pack = "pack(dequantize=true)" if name in EXPANDED else "pack"
    result = check_reader(source(name), f"quantize.rtn(scheme=w4a16g32) | {pack}", tmp_path)
    count = FAMILIES[name].linears
    assert result.plan.steps[0].targeted == tuple(result.manifest.weights)
    assert result.manifest.coverage == {"targeted": count, "transformed": count, "skipped": 0}
    assert not [weight for weight in result.manifest.weights if "vision" in weight]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_plan_tells_the_bytes_on_disk(name: str, source: Source, tmp_path: Path) -> None:
    pack = "pack(dequantize=true)" if name in EXPANDED else "pack"
    result = run(source(name), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32) | {pack}", shard_bytes=50_000)
    step = result.plan.steps[-1]
    assert step.payload_bytes == open_checkpoint(result.out).nbytes
    files = [*result.out.glob("*.safetensors"), *result.out.glob("*.index.json"), result.out / "config.json"]
    assert len(files) > 3
    assert step.disk_bytes == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("name", EXPANDED)
def test_default_load_is_refused_where_the_reader_would_fail(name: str, source: Source, tmp_path: Path) -> None:
    text = refused(source(name), "quantize.rtn(scheme=w4a16g32) | pack", tmp_path, EXPANDED[name])
    assert "dequantize=true" in text


@pytest.mark.parametrize("name", FUSED_EXPERTS)
def test_fused_experts_become_canonical_but_are_not_packed(name: str, source: Source, tmp_path: Path) -> None:
    weights = resolve(open_checkpoint(source(name))).weights
    experts = [weight for weight in weights if weight.experts is not None and weight.kind == "expert"]
    assert {(w.experts, w.in_features) for w in experts} == {(4, 64), (4, 96)}
    text = refused(source(name), "quantize.rtn(scheme=w4a16g32) | pack", tmp_path, "experts")
    assert f"'{experts[0].name}'" in text
    result = run(source(name), tmp_path / "canonical", "quantize.rtn(scheme=w4a16g32)")
    count = FAMILIES[name].linears
    assert result.manifest.coverage == {"targeted": count, "transformed": count, "skipped": 0}
    assert all(record.error and record.error < 0.2 for record in result.manifest.weights.values())
    meant, model = (
        load_file(folder / "model.safetensors") for folder in (dense_meaning(result.out, tmp_path / "dense_view"), source(name))
    )
    for weight in result.manifest.weights:
        assert 0 < (meant[weight] - model[weight]).float().norm() / model[weight].float().norm() < 0.2


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_the_rest_is_packed_beside_fused_experts(name: str, source: Source, tmp_path: Path) -> None:
    result = check_reader(source(name), "quantize.rtn(scheme=w4a16g32, skip=[experts]) | pack", tmp_path)
    assert len(result.manifest.weights) == 2 * 4


@pytest.mark.parametrize("pack", ["pack", "pack(dequantize=true)"])
def test_llama4_is_refused_even_with_dense_experts(pack: str, source: Source, tmp_path: Path) -> None:
    text = refused(source("llama4"), f"quantize.rtn(scheme=w4a16g32, skip=[experts]) | {pack}", tmp_path, "splits these experts")
    assert "feed_forward.experts" in text


@pytest.mark.parametrize("pack", ["pack", "pack(dequantize=true)"])
@pytest.mark.parametrize("name", LONE_EXPERTS)
def test_dense_lone_experts_are_refused_beside_packed_weights(name: str, pack: str, source: Source, tmp_path: Path) -> None:
    text = refused(source(name), f"quantize.rtn(scheme=w4a16g32, skip=[experts]) | {pack}", tmp_path, "loses it")
    assert ".experts.0." in text
    assert "quantize the experts as well" in text


def test_convolutions_that_are_fused_on_load_are_refused(source: Source, tmp_path: Path) -> None:
    assert "conv1d" in refused(source("olmo_hybrid"), "quantize.rtn(scheme=w4a16g32) | pack", tmp_path, "loses it")


def test_linears_that_are_split_on_load_stay_dense(source: Source, tmp_path: Path) -> None:
    text = refused(source("gte"), "quantize.rtn(scheme=w4a16g32) | pack", tmp_path, "splits or permutes")
    assert "qkv_proj" in text
    skip = "quantize.rtn(scheme=w4a16g32, skip=['re:.*(qkv_proj|up_gate_proj)']) | pack"
    assert len(check_reader(source("gte"), skip, tmp_path).manifest.weights) == 2 * 2


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama", "w8a16g32, targets=[attention]", "w4a16g32, targets=[mlp]"),
        ("llama", "w3a16g32, targets=[attention]", "w4a16, targets=[mlp]"),
        ("mixtral", "w8a16g32, targets=[attention]", "w4a16g32, targets=[experts]"),
        ("mixtral", "w2a16g16, targets=[attention]", "w3a16g32, targets=[experts]"),
        # The reader takes the first group that speaks of experts for theirs, and the shared ones are called so as well.
        ("deepseek_v3", "w4a16g32, targets=[attention, mlp]", "w8a16g32, targets=[experts]"),
        ("deepseek_v3", "w8a16g32, targets=[attention, mlp]", "w4a16g32, targets=[experts]"),
        ("whisper", "w8a16g32, targets=['re:model.decoder.*(proj|fc.).weight']", "w4a16g32, skip=['re:model.decoder']"),
        ("llava", "w8a16g32, targets=['re:.*vision_tower.*(proj|fc.).weight']", "w4a16g32"),
    ],
)
def test_groups_of_different_schemes(name: str, first: str, second: str, source: Source, tmp_path: Path) -> None:
    check_reader(source(name), f"quantize.rtn(scheme={first}) | quantize.rtn(scheme={second}) | pack", tmp_path)


def test_unequal_experts_are_refused(source: Source, tmp_path: Path) -> None:
    first = "quantize.rtn(scheme=w4a16g32, targets=['re:.*layers.0.*experts'])"
    second = "quantize.rtn(scheme=w8a16g32, targets=['re:.*layers.1.*experts'])"
    refused(source("mixtral"), f"{first} | {second} | pack", tmp_path, "one scheme for all experts")
    refused(source("mixtral"), f"{first} | pack", tmp_path, "one scheme for all experts")


def test_mixed_groups_are_refused_where_the_reader_expands_at_load(source: Source, tmp_path: Path) -> None:
    lines = "quantize.rtn(scheme=w8a16g32, targets=[attention]) | quantize.rtn(scheme=w4a16g32, targets=[mlp])"
    refused(source("llama"), f"{lines} | pack(dequantize=true)", tmp_path, "one scheme for all linears")


@pytest.mark.parametrize("scheme", ["w2a16g16", "w3a16g32", "w8a16", "w4a16"])
def test_symmetric_schemes(scheme: str, source: Source, tmp_path: Path) -> None:
    check_reader(source("llama"), f"quantize.rtn(scheme={scheme}) | pack", tmp_path)


@pytest.mark.parametrize("scheme", ["w2a16g16-asym", "w3a16g32-asym", "w4a16g32-asym", "w8a16-asym"])
def test_asymmetric_schemes_need_expanding_at_load(scheme: str, source: Source, tmp_path: Path) -> None:
    recipe = f"quantize.rtn(scheme={scheme}) | pack"
    if scheme.startswith("w4"):
        # vLLM reads it; transformers does not, and that is counted.
        result = run(source("llama"), tmp_path / "served", recipe)
        loads = {verdict.reader: verdict.loads for verdict in result.plan.verdicts}
        assert loads["transformers"] == "no"
        assert loads["vllm"] != "no"
        assert [note.count for note in result.manifest.notes if note.what == "not read"] == [len(result.manifest.weights)]
    else:
        assert "dequantize=true" in refused(source("llama"), recipe, tmp_path, "zero points")
    check_reader(source("llama"), f"{recipe}(dequantize=true)", tmp_path)


def test_asymmetric_experts_that_nobody_serves_are_refused(source: Source, tmp_path: Path) -> None:
    recipe = "quantize.rtn(scheme=w8a16g32-asym, targets=experts) | pack(dequantize=true)"
    refused(source("mixtral"), recipe, tmp_path, "no reader loads w8a16g32-asym")


@pytest.mark.parametrize("ragged", ["divide", "channel"])
def test_ragged_groups(ragged: str, source: Source, tmp_path: Path) -> None:
    result = check_reader(source("llama"), f"quantize.rtn(scheme=w4a16g64, ragged={ragged}) | pack", tmp_path)
    assert [note.count for note in result.manifest.notes if note.what == "ragged"] == [2]


def test_head_is_packed_where_it_is_named(source: Source, tmp_path: Path) -> None:
    check_reader(source("llama"), "quantize.rtn(scheme=w4a16g32, targets=[linear, head]) | pack", tmp_path)


# Families of 2025 and 2026

RECALIBRATED = (
    f"calibrate(data='{ready_inputs(5)}', samples=5, length=24) | quantize.gptq(scheme=w4a16g32, ragged=channel, min_tokens=0)"
)
NATIVE = {"kimi_linear": "loses it", "glm5_next": "loses it", "llama4_vl": "splits these experts"}
"""Families that transformers' reader of compressed-tensors does not take, and why; `compress.load` does."""


@pytest.mark.parametrize("name", shared(list(RECENT)))
def test_recent_families_end_to_end(name: str, source: Source, tmp_path: Path) -> None:
    """Calibrated on text, packed and read with the logits that are meant; what is left alone keeps its bytes, and is counted."""
    recipe = RECALIBRATED
    if name == "llama4_vl":
        refused(source(name), f"{recipe} | pack", tmp_path, "cannot be watched", CoverageError)
        recipe = f"{recipe[:-1]}, skip=experts) | quantize.rtn(scheme=w4a16g32, targets=experts)"
    if name in NATIVE:
        refused(source(name), f"{recipe} | pack", tmp_path, NATIVE[name])
        result = run(source(name), tmp_path / "out", f"{recipe} | pack(format=native)")
        packed = open_checkpoint(result.out)
        if name == "llama4_vl":
            # transformers 5.24 cannot run the whole model on a text, packed or not, so its weights are compared.
            held, meant = DenseView(packed), load_file(dense_view(result, tmp_path / "dense_view") / "model.safetensors")
            assert all(torch.equal(held.dense(weight), meant[weight]) for weight in result.manifest.weights)
        else:
            found, meant = logits(load_native(result.out, "float32")), logits(model_of_codes(packed, rounded=False))
            torch.testing.assert_close(found, meant, rtol=1e-4, atol=1e-4)
    else:
        result = check_reader(source(name), f"{recipe} | pack", tmp_path)
    family = RECENT[name]
    count = family.linears - family.left
    assert result.manifest.coverage == {"targeted": count, "transformed": count, "skipped": 0}
    left = [note for note in result.manifest.notes if note.what == "left alone by default"]
    described = [w for w in resolve(open_checkpoint(source(name))).weights if w.left_alone]
    assert sorted(name for note in left for name in note.names) == sorted(weight.name for weight in described)
    assert all(record.error and record.error < 0.3 for record in result.manifest.weights.values())
    before, after = open_checkpoint(source(name)), open_checkpoint(result.out)
    dense = [name for name in before.refs if name not in result.manifest.weights]
    assert len(dense) == len(before.refs) - count
    assert all(torch.equal(before.read(name), after.read(name)) for name in dense)
    if "vision_config" in family.config:
        (towers,) = [note for note in result.manifest.notes if note.what == "untouched" and "pass through byte" in note.reason]
        assert set(towers.names) == {name for name in dense if re.search(r"vision|visual|projector", name)}
        assert towers.count > 10


@pytest.mark.parametrize("scheme", ["w4a16g32", "w8a16"])
def test_what_is_left_alone_is_taken_with_skip_defaults_off(scheme: str, source: Source, tmp_path: Path) -> None:
    recipe = f"quantize.rtn(scheme={scheme}, skip_defaults=off)"
    result = check_reader(source("qwen3_next"), f"{recipe} | pack", tmp_path)
    assert sum(name.endswith("in_proj_ba.weight") for name in result.manifest.weights) == RECENT["qwen3_next"].left
    assert not [note for note in result.manifest.notes if note.what == "left alone by default"]


def test_plan_prints_what_is_left_alone_and_what_passes_through(source: Source) -> None:
    said = compress("plan", source("qwen3_5_vl"), "-p", "quantize.rtn(scheme=w4a16g32) | pack")
    assert said.returncode == 0, said.stderr
    assert (
        "left alone by default: 6 (decay and write strength of linear attention, whose errors add up along the text)"
        in said.stdout
    )
    assert re.search(
        r"untouched: \d\d \(towers and what joins them to the text model: they pass through byte for byte\)", said.stdout
    )


def test_naming_only_what_is_left_alone_says_how_to_take_it(source: Source, tmp_path: Path) -> None:
    said = compress(
        "quantize", "rtn", source("qwen3_next"), tmp_path / "out", "--scheme", "w8a16", "--targets", "re:.*in_proj_ba"
    )
    assert said.returncode == CoverageError.exit_status
    assert "leave no weight to work on" in said.stderr
    assert "give skip_defaults=off" in said.stderr
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_no_known_kind_stops_a_pass(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a family that nobody has looked at yet: it must not stay dense in silence."""
    monkeypatch.setitem(left_alone._TABLE, "deepseek_v4", {})
    for recipe in ("quantize.rtn(scheme=w4a16g32)", "prune.magnitude(sparsity=0.5)"):
        with pytest.raises(CoverageError, match="is a matrix of no kind that is known here") as error:
            run(source("deepseek_v4"), tmp_path / "refused", recipe)
        assert "DeepseekV4HyperConnection.fn [8, 128]" in str(error.value)
        assert "DeepseekV4GroupedLinear multiplies in a way of its own" in str(error.value)
        assert "skip it by name, which leaves it as it is" in str(error.value)
        assert not (tmp_path / "refused").exists()
    named = run(source("deepseek_v4"), tmp_path / "named", "quantize.rtn(scheme=w4a16g32, skip=['re:.*(_fn|wo_a.weight)'])")
    allowed = run(source("deepseek_v4"), tmp_path / "allowed", "quantize.rtn(scheme=w4a16g32)", allow_skips=["_fn|wo_a"])
    assert named.manifest.weights == allowed.manifest.weights
    assert allowed.manifest.coverage["skipped"] == 3 * (2 + 1)


MTP = {
    "qwen3_next": ("mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight"),
    "glm4_moe": ("model.layers.2.mlp.experts.0.up_proj.weight", "model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"),
}
"""Tensors of layers that predict further tokens, as they lie in published checkpoints."""


def with_mtp(name: str, source: Source, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a family's model that has these tensors as well."""
    more = {key: torch.randn((64, 128)[: 1 + ("norm" not in key)]).bfloat16() for key in MTP.get(name, ["mtp.fc.weight"])}
    shutil.copytree(source(name), folder)
    save_file({**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors", {"format": "pt"})
    return folder, more


def test_layers_for_further_tokens_are_refused_where_a_reader_stops_at_them(source: Source, tmp_path: Path) -> None:
    """mlx-lm leaves those of Qwen3-Next out, and loads no other tensor that its model does not have."""
    recipe = "quantize.rtn(scheme=w4a16g32, targets=attention, ragged=divide) | pack(format=mlx)"
    text = refused(with_mtp("llama", source, tmp_path / "llama")[0], recipe, tmp_path, "layers that predict further tokens")
    assert "'mtp.fc.weight'" in text
    assert run(with_mtp("qwen3_next", source, tmp_path / "qwen3_next")[0], tmp_path / "out", recipe).out.exists()


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", MTP)
def test_layers_for_further_tokens_are_kept_and_counted(name: str, form: str, source: Source, tmp_path: Path) -> None:
    """Readers that do take them learn from the config that they are not in codes; all others load the model as it is."""
    folder, more = with_mtp(name, source, tmp_path / "source")
    result = run(folder, tmp_path / "out", f"quantize.rtn(scheme=w4a16g32, ragged=channel) | pack(format={form})")
    (kept,) = [note for note in result.manifest.notes if note.what == "unused"]
    assert set(kept.names) == set(more)
    assert "predict further tokens (MTP)" in kept.reason
    after = open_checkpoint(result.out)
    assert all(torch.equal(after.read(key), value) for key, value in more.items())
    quantization = json.loads((result.out / "config.json").read_text())["quantization_config"]
    rules = quantization["ignore"] if form == "compressed-tensors" else quantization["dynamic"]
    quantized = [key.removesuffix(".weight") for key in result.manifest.weights]
    for key in more:
        assert any(re.match(rule.partition(":")[2], key.removesuffix(".weight")) for rule in rules if rule[0] in "r-")
    inside = [rule for rule in rules if rule.partition(":")[2].startswith(("mtp", "model\\.layers\\.2"))]
    assert len(inside) == 1
    assert not any(re.match(inside[0].partition(":")[2], path) for path in quantized)
    if form == "compressed-tensors":
        assert torch.equal(logits(load(result.out)), logits(load(dense_view(result, tmp_path / "dense_view"))))
