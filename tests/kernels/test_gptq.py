"""gptq: the words against their formulas, what is refused, the config as its readers take it, whole artifacts."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.contract.step_plan import Plan
from compress.errors import FormatError, RecipeError, Refusal
from compress.kernels.gptq.layout import Gptq, suffixes
from compress.layerwise import model
from compress.pipeline.plan import PlanOptions, make_plan
from compress.spec.recipe import parse_one_liner
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight
from families import build
from support import linear, logits, random_codes, run, step_of, tiny_llama

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SCHEMES = [f"w{b}a16{g}{a}" for b in (2, 3, 4, 8) for g in ("", "g32", "g16", "g96") for a in ("", "-asym")]


def field(words: list[int], index: int, bits: int) -> int:
    """Value `index` of a stream of 32-bit words, by arithmetic on one large integer."""
    stream = sum((word & 0xFFFFFFFF) << (32 * number) for number, word in enumerate(words))
    return stream >> (bits * index) & ((1 << bits) - 1)


def by_the_formula(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """fp32 weights [out, in], element by element."""
    qweight, qzeros, scales, g_idx = (tensors[f"m.layers.0.q.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    columns = [column.tolist() for column in qweight.T]
    zeros = [[field(row.tolist(), n, bits) + 1 for n in range(len(columns))] for row in qzeros]
    steps = [
        [field(column, k, bits) - zeros[group][n] for k, group in enumerate(g_idx.tolist())] for n, column in enumerate(columns)
    ]
    return scales[g_idx.long()].T.float() * torch.tensor(steps, dtype=torch.float32)


@pytest.mark.parametrize("text", SCHEMES)
def test_words_are_what_the_formula_says_and_come_back(text: str) -> None:
    weight, scheme = linear(), Scheme.parse(text)
    q = random_codes(weight, scheme, least_zero=1)
    Gptq().refuse(weight, State(scheme))
    tensors = Gptq().encode(weight, q)
    assert torch.equal(by_the_formula(tensors, scheme.bits), q.dequantize())
    back = Gptq().decode(weight, State(scheme), tensors)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert back.scale.dtype == torch.bfloat16
    assert (back.zero is None) == (q.zero is None)
    assert q.zero is None or torch.equal(back.zero, q.zero)


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_zero_points_of_symmetric_codes_are_the_known_words(bits: int, word: int) -> None:
    weight, scheme = linear(), Scheme(bits, 32)
    zeros = Gptq().encode(weight, random_codes(weight, scheme, least_zero=1))["m.layers.0.q.qzeros"]
    assert {value & 0xFFFFFFFF for value in zeros.flatten().tolist()} == {word}


@pytest.mark.parametrize(("bits", "do"), [(4, "awq"), (3, "compressed-tensors")])
def test_a_zero_point_of_zero_is_refused_by_name(bits: int, do: str) -> None:
    weight = linear()
    q = random_codes(weight, Scheme(bits, 32, symmetric=False), least_zero=1)
    assert q.zero is not None
    q.zero[3, 1] = 0
    with pytest.raises(FormatError) as caught:
        Gptq().encode(weight, q)
    problem = caught.value.problems[0]
    assert "m.layers.0.q.weight" in problem.where
    assert problem.got == "1 of 192 are 0"
    assert do in problem.do


@pytest.mark.parametrize("value", [1e-6, 7e4, -1e5, float("nan")])
def test_scales_outside_of_fp16_are_refused(value: float) -> None:
    weight = linear()
    q = random_codes(weight, Scheme(4, 32), least_zero=1)
    q.scale[5, 2] = value
    with pytest.raises(FormatError, match="scales that fp16 can hold"):
        Gptq().encode(weight, q)


def test_scales_of_bf16_are_exact_down_to_two_to_the_minus_17() -> None:
    weight, scheme = linear(), Scheme(4)
    mantissas = torch.arange(128, 192) / 128
    for exponent in range(-17, 15):
        q = random_codes(weight, scheme, least_zero=1)
        q.scale[:, 0] = (mantissas * 2.0**exponent).bfloat16()
        assert torch.equal(Gptq().decode(weight, State(scheme), Gptq().encode(weight, q)).scale, q.scale)
    q.scale[:, 0] = (mantissas * 2.0**-18).bfloat16()
    with pytest.raises(FormatError, match="32 of 64"):
        Gptq().encode(weight, q)


def test_scales_of_fp32_are_rounded_to_fp16() -> None:
    weight, scheme = linear(dtype="F32"), Scheme(4, 32)
    q = random_codes(weight, scheme, torch.float32, least_zero=1)
    back = Gptq().decode(weight, State(scheme), Gptq().encode(weight, q))
    assert back.scale.dtype == torch.float32
    assert torch.equal(back.codes, q.codes)
    assert 0 < ((back.scale - q.scale) / q.scale).abs().max() <= 2**-11


@pytest.mark.parametrize(
    ("weight", "scheme", "reason"),
    [
        (linear((4, 64, 96), kind="expert"), "w4a16", "no fused experts"),
        (linear(kind="embedding", block=None), "w4a16", "no quantized embedding"),
        (linear(kind="head", block=None), "w4a16", "no quantized head"),
        (linear(converted=True), "w4a16", "splits or permutes"),
        (linear(transposed=True), "w4a16", "Conv1D"),
        (linear(block=None, stack=""), "w4a16", "blocks of the decoder"),
        (linear(stack="encoder"), "w4a16", "blocks of the decoder"),
        (linear(stack="tower:vision"), "w4a16", "blocks of the decoder"),
        (linear(name="m.layers.0.q.kernel"), "w4a16", "stand for .weight"),
        (linear((64, 100)), "w4a16", "multiples of 32"),
        (linear((60, 96)), "w4a16", "multiples of 32"),
        (linear(), "w4a16g64", "do not divide"),
        (linear(), "w4a16g128", "do not divide"),
    ],
)
def test_refusals(weight: Weight, scheme: str, reason: str) -> None:
    Gptq().refuse(weight, State())
    with pytest.raises(Refusal, match=reason):
        Gptq().refuse(weight, State(Scheme.parse(scheme)))


def test_an_expert_of_its_own_is_taken() -> None:
    Gptq().refuse(linear(kind="expert", converted=True), State(Scheme(4, 32)))


def planned(source: Path, recipe: str) -> Plan:
    checkpoint = open_checkpoint(source)
    return make_plan(parse_one_liner(recipe), checkpoint, resolve(checkpoint), PlanOptions(2))


def config_of(plan: Plan) -> dict[str, Any]:
    found = json.loads(plan.steps[-1].texts["config.json"])["quantization_config"]
    assert json.loads(plan.steps[-1].texts["quantize_config.json"]) == found
    return found


def as_read(config: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The options of one module as GPTQModel and vLLM look them up, None where it stays dense."""
    base = {key: config[key] for key in ("bits", "group_size", "sym")}
    hits = [(rule, differs) for rule, differs in config.get("dynamic", {}).items() if re.match(rule[2:], path)]
    assert len(hits) <= 1
    if hits and hits[0][0].startswith("-:"):
        return None
    return {**base, **(hits[0][1] if hits else {})}


def options(scheme: Scheme | None) -> dict[str, Any] | None:
    return None if scheme is None else {"bits": scheme.bits, "group_size": scheme.group or -1, "sym": scheme.symmetric}


def check_rules(plan: Plan) -> dict[str, Any]:
    """Every linear of the blocks is read as what it is, by each of its names."""
    config = config_of(plan)
    for weight in plan.weights:
        if weight.kind not in ("linear", "expert", "router") or (weight.attribute != "weight" and weight.experts is None):
            continue
        expected = options(plan.steps[-1].after[weight.name].scheme)
        for path in {weight.name.removesuffix(".weight"), *([weight.module] if weight.kind != "expert" else [])}:
            assert as_read(config, path) == expected, path
    return config


def verdicts(plan: Plan) -> dict[str, str]:
    return {verdict.reader: verdict.loads for verdict in plan.verdicts}


def test_config_of_one_scheme(tiny: Path) -> None:
    plan = planned(tiny, "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)")
    config = check_rules(plan)
    assert config.pop("meta")["quantizer"][0].startswith("compress:")
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "format": "gptq",
        "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    found = verdicts(plan)
    assert found.pop("sglang") == found.pop("exllamav2") == "unknown"
    assert set(found.values()) == {"yes"}


def test_config_of_a_scheme_per_channel(tiny: Path) -> None:
    config = check_rules(planned(tiny, "quantize.rtn(scheme=w8a16-asym, least_zero=1) | pack(format=gptq)"))
    assert (config["bits"], config["group_size"], config["sym"]) == (8, -1, False)


def test_config_of_skipped_layers(tiny: Path) -> None:
    plan = planned(tiny, "quantize.rtn(scheme=w4a16g32, skip=['re:.*layers.1.mlp.*', 're:.*[qkv]_proj.*']) | pack(format=gptq)")
    config = check_rules(plan)
    assert as_read(config, "model.layers.0.self_attn.qkv_proj") is None
    assert as_read(config, "model.layers.1.mlp.gate_up_proj") is None
    assert as_read(config, "model.layers.0.mlp.gate_up_proj") == options(Scheme(4, 32))
    listed = config["modules_in_block_to_quantize"][0]
    quantized = {name.removesuffix(".weight") for name, state in plan.steps[-1].after.items() if state.scheme}
    linears = {w.module for w in plan.weights if w.kind == "linear"}
    # As optimum compares, and as vLLM does.
    assert {path for path in linears if any(path.endswith(part) for part in listed)} == quantized
    assert {path for path in linears if any(part in path for part in listed)} == quantized
    assert "self_attn.o_proj" in listed
    assert verdicts(plan)["auto-gptq"] == "no"
    assert verdicts(plan)["transformers"] == "yes"


def test_config_of_mixed_schemes(tiny: Path) -> None:
    plan = planned(
        tiny, "quantize.rtn(scheme=w4a16g32, targets=mlp) | quantize.rtn(scheme=w8a16, targets=attention) | pack(format=gptq)"
    )
    config = check_rules(plan)
    assert config["bits"] == 8
    assert as_read(config, "model.layers.1.mlp.gate_up_proj") == options(Scheme(4, 32))
    assert as_read(config, "model.layers.1.self_attn.qkv_proj") == options(Scheme(8))
    assert "modules_in_block_to_quantize" not in config
    found = verdicts(plan)
    assert found["auto-gptq"] == found["transformers"] == found["exllamav2"] == "no"
    assert found["vllm"] == found["gptqmodel"] == "unknown"


@pytest.mark.parametrize(
    ("recipe", "vllm"),
    [
        ("quantize.rtn(scheme=w3a16g32)", "no"),
        ("quantize.rtn(scheme=w4a16g32-asym, least_zero=1)", "no"),
        ("quantize.rtn(scheme=w8a16g16)", "no"),
        ("quantize.rtn(scheme=w8a16)", "yes"),
        ("quantize.rtn(scheme=w4a16g32, skip='re:.*q_proj.*')", "no"),
    ],
)
def test_reader_matrix(recipe: str, vllm: str, tiny: Path) -> None:
    assert verdicts(planned(tiny, f"{recipe} | pack(format=gptq)"))["vllm"] == vllm


def test_experts_have_one_rule_where_they_are_alike(tmp_path: Path) -> None:
    source = build("mixtral", tmp_path / "m")
    everything = planned(source, "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)")
    config = check_rules(everything)
    assert as_read(config, "model.layers.0.block_sparse_moe.experts") == options(Scheme(4, 32))
    assert verdicts(everything)["transformers"] == "no"
    dense = planned(source, "quantize.rtn(scheme=w4a16g32, skip=experts) | pack(format=gptq)")
    config = check_rules(dense)
    assert as_read(config, "model.layers.1.block_sparse_moe.experts") is None
    assert len(config["dynamic"]) == 3
    assert verdicts(dense)["vllm"] == verdicts(dense)["transformers"] == "unknown"
    unlike = "quantize.rtn(scheme=w4a16g32, skip='re:.*layers.1.*experts.2.*') | pack(format=gptq)"
    check_rules(planned(source, unlike))
    assert verdicts(planned(source, unlike))["vllm"] == "no"


def test_suffixes_suffice_or_are_whole_paths() -> None:
    assert suffixes(["m.layers.0.mlp.gate", "m.layers.1.mlp.gate"], ["m.layers.0.mlp.up"]) == ["mlp.gate"]
    assert suffixes(["m.layers.1.mlp.gate"], ["m.layers.0.mlp.gate_proj"]) == ["m.layers.1.mlp.gate"]


RECIPES = [
    "quantize.rtn(scheme=w4a16g32)",
    "quantize.rtn(scheme=w3a16g32)",
    "quantize.rtn(scheme=w2a16-asym, least_zero=1)",
    "quantize.rtn(scheme=w8a16-asym, least_zero=1, targets=attention) | quantize.rtn(scheme=w4a16g32, skip=attention)",
    "prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w4a16, skip='re:.*layers.1.*')",
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_artifact_means_what_the_codes_mean(name: str, recipe: str, tmp_path: Path) -> None:
    """Equal to the bit: the same codes and zero points, scales of bf16 that fp16 holds, one dequantize, one rounding."""
    source = build(name, tmp_path / "m")
    out = run(source, tmp_path / "out", f"{recipe} | pack(format=gptq)").out
    steps = sorted(path for path in step_of(out, "quantize.rtn").parent.iterdir() if path.is_dir())
    for dtype in ("float32", "bfloat16"):
        packed, canonical = (model.build(open_checkpoint(place), dtype) for place in (out, steps[-1]))
        assert torch.equal(logits(packed), logits(canonical))


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_planned_bytes_and_digests_are_those_written(shard_bytes: int, tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", "quantize.rtn(scheme=w3a16g32) | pack(format=gptq)", shard_bytes=shard_bytes)
    step = result.plan.steps[-1]
    assert step.payload_bytes == open_checkpoint(result.out).nbytes
    names = ("config.json", "quantize_config.json")
    shards = [path for path in result.out.iterdir() if path.name.startswith("model")]
    assert step.disk_bytes == sum(path.stat().st_size for path in [*shards, *(result.out / name for name in names)])
    text = (result.out / "quantize_config.json").read_bytes()
    assert result.manifest.files["quantize_config.json"] == hashlib.sha256(text).hexdigest()
    assert json.loads(text) == json.loads((result.out / "config.json").read_text())["quantization_config"]


def test_what_cannot_be_said_publishes_nothing(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m")
    recipe = "quantize.rtn(scheme=w2a16g8-asym)"
    with pytest.raises(RecipeError, match="least_zero=1"):
        run(source, tmp_path / "out", f"{recipe} | pack(format=gptq)")
    run(source, tmp_path / "codes", recipe)
    with pytest.raises(FormatError, match="zero points from 1 on"):
        # Groups of 8 of 2 bits: some have no negative number.
        run(tmp_path / "codes", tmp_path / "out", "pack(format=gptq)")
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", f"{recipe[:-1]}, least_zero=1) | pack(format=gptq)")
