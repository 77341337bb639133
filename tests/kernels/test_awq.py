"""awq: the words against their formulas, what is refused, the config as its readers take it, whole artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.contract.step_plan import Plan
from compress.errors import FormatError, Refusal
from compress.kernels.awq.layout import INVERSE, ORDER, Awq
from compress.layerwise import model
from compress.numerics.qtensor import QTensor
from compress.pipeline.plan import PlanOptions, make_plan
from compress.spec.recipe import parse_one_liner
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight
from families import build
from support import linear, logits, random_codes, run, step_of

SCHEMES = [f"w4a16{g}{a}" for g in ("", "g32", "g16", "g96") for a in ("", "-asym")]


def nibble(words: list[int], n: int) -> int:
    """Of a row of words, the value of output n."""
    return words[n // 8] >> (4 * [0, 2, 4, 6, 1, 3, 5, 7].index(n % 8)) & 15


@pytest.mark.parametrize("text", SCHEMES)
def test_words_are_what_the_formula_says_and_come_back(text: str) -> None:
    weight, scheme = linear(), Scheme.parse(text)
    q = random_codes(weight, scheme)
    Awq().refuse(weight, State(scheme))
    tensors = Awq().encode(weight, q)
    qweight, qzeros, scales = (tensors[f"m.layers.0.q.{part}"] for part in ("qweight", "qzeros", "scales"))
    group, zeros = scheme.group or 96, qzeros.tolist()
    steps = [[nibble(row, n) - nibble(zeros[k // group], n) for n in range(64)] for k, row in enumerate(qweight.tolist())]
    spread = scales.repeat_interleave(group, 0).float()
    assert torch.equal((spread * torch.tensor(steps, dtype=torch.float32)).T, q.dequantize())
    back = Awq().decode(weight, State(scheme), tensors)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert back.scale.dtype == torch.bfloat16
    assert (back.zero is None) == (q.zero is None)
    assert q.zero is None or torch.equal(back.zero, q.zero)


def test_the_order_of_a_word() -> None:
    assert [ORDER[j] for j in INVERSE] == list(range(8))
    weight = linear((32, 32))
    ramp = (torch.arange(32, dtype=torch.uint8) % 8)[:, None].expand(32, 32).contiguous()
    words = Awq().encode(weight, QTensor(Scheme(4), ramp, torch.ones(32, 1).bfloat16()))["m.layers.0.q.qweight"]
    assert {word & 0xFFFFFFFF for word in words.flatten().tolist()} == {0x75316420}


def test_symmetric_codes_have_the_zero_point_eight() -> None:
    weight, scheme = linear(), Scheme(4, 32)
    zeros = Awq().encode(weight, random_codes(weight, scheme))["m.layers.0.q.qzeros"]
    assert {word & 0xFFFFFFFF for word in zeros.flatten().tolist()} == {0x88888888}


def test_scales_outside_of_fp16_are_refused() -> None:
    weight = linear()
    q = random_codes(weight, Scheme(4, 32))
    q.scale[5, 2] = 1e-7
    with pytest.raises(FormatError, match="scales that fp16 can hold"):
        Awq().encode(weight, q)


@pytest.mark.parametrize(
    ("weight", "scheme", "reason"),
    [
        (linear(), "w8a16g32-asym", "holds 4 bits, not 8"),
        (linear(), "w3a16g32", "holds 4 bits, not 3"),
        (linear((4, 64, 96), kind="expert"), "w4a16", "no fused experts"),
        (linear(kind="embedding", block=None), "w4a16", "no quantized embedding"),
        (linear(kind="head", block=None), "w4a16", "no quantized head"),
        (linear(converted=True), "w4a16", "splits or permutes"),
        (linear(transposed=True), "w4a16", "Conv1D"),
        (linear(stack="encoder"), "w4a16", "blocks of the decoder"),
        (linear((64, 100)), "w4a16", "multiples of 32"),
        (linear((60, 96)), "w4a16", "multiples of 32"),
        (linear(), "w4a16g64", "do not divide"),
    ],
)
def test_refusals(weight: Weight, scheme: str, reason: str) -> None:
    Awq().refuse(weight, State())
    with pytest.raises(Refusal, match=reason):
        Awq().refuse(weight, State(Scheme.parse(scheme)))


def planned(source: Path, recipe: str) -> Plan:
    checkpoint = open_checkpoint(source)
    return make_plan(parse_one_liner(recipe), checkpoint, resolve(checkpoint), PlanOptions(2))


def config_of(plan: Plan) -> dict[str, Any]:
    found = json.loads(plan.steps[-1].texts["config.json"])["quantization_config"]
    assert isinstance(found, dict)
    return found


def verdicts(plan: Plan) -> dict[str, str]:
    return {verdict.reader: verdict.loads for verdict in plan.verdicts}


@pytest.mark.parametrize("scheme", ["w4a16g32-asym", "w4a16g32"])
def test_config_of_one_scheme(scheme: str, tiny: Path) -> None:
    plan = planned(tiny, f"quantize.rtn(scheme={scheme}) | pack(format=awq)")
    assert config_of(plan) == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert verdicts(plan) == {
        "auto-awq": "unknown", "gptqmodel": "yes", "transformers": "yes", "vllm": "yes", "sglang": "unknown",
    }  # fmt: skip


def test_symmetric_and_asymmetric_codes_may_be_mixed(tiny: Path) -> None:
    recipe = "quantize.rtn(scheme=w4a16-asym, targets=mlp) | quantize.rtn(scheme=w4a16, targets=attention) | pack(format=awq)"
    assert config_of(planned(tiny, recipe))["group_size"] == -1


def test_mixed_groups_are_refused(tiny: Path) -> None:
    with pytest.raises(FormatError, match="one group size for all weights"):
        planned(
            tiny, "quantize.rtn(scheme=w4a16g32, targets=mlp) | quantize.rtn(scheme=w4a16, targets=attention) | pack(format=awq)"
        )


def test_a_path_that_is_part_of_a_quantized_one_is_refused(tiny: Path) -> None:
    model_ = resolve(open_checkpoint(tiny))
    dense, quantized = linear(name="m.layers.0.gate.weight", module="m.layers.0.gate"), linear(name="m.layers.0.gate_proj.weight")
    together = type(model_)((dense, quantized))
    found = Awq().refuse_together(together, {dense.name: State(), quantized.name: State(Scheme(4))})
    assert [name for name, _, _ in found] == [dense.name]


def test_dense_layers_are_found_by_every_reader(tiny: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    plan = planned(tiny, "quantize.rtn(scheme=w4a16g32, skip=['re:.*layers.1.mlp.*', 're:.*o_proj.*']) | pack(format=awq)")
    listed = config_of(plan)["modules_to_not_convert"]
    assert "self_attn.o_proj" in listed
    assert "model.layers.1.mlp.up_proj" in listed
    for weight in plan.weights:
        if weight.kind in ("linear", "head"):
            quantized = plan.steps[-1].after[weight.name].scheme is not None
            assert should_convert_module(weight.module, listed) == quantized
            # As AutoAWQ and vLLM compare.
            assert (not any(part in weight.module for part in listed)) == quantized


def test_experts_that_are_all_dense_have_one_path(tmp_path: Path) -> None:
    source = build("mixtral", tmp_path / "m")
    plan = planned(source, "quantize.rtn(scheme=w4a16g32, skip=experts) | pack(format=awq)")
    listed = config_of(plan)["modules_to_not_convert"]
    assert listed == ["block_sparse_moe.experts", "block_sparse_moe.gate", "mlp.gate", "lm_head"]
    assert verdicts(plan)["transformers"] == verdicts(plan)["vllm"] == "unknown"
    everything = planned(source, "quantize.rtn(scheme=w4a16g32) | pack(format=awq)")
    assert config_of(everything)["modules_to_not_convert"] == ["block_sparse_moe.gate", "mlp.gate", "lm_head"]
    assert verdicts(everything)["transformers"] == "no"


@pytest.mark.parametrize("recipe", ["quantize.rtn(scheme=w4a16g16-asym)", "quantize.rtn(scheme=w4a16, skip='re:.*layers.1.*')"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_artifact_means_what_the_codes_mean(name: str, recipe: str, tmp_path: Path) -> None:
    """Equal to the bit: the same codes and zero points, scales of bf16 that fp16 holds, one dequantize, one rounding."""
    source = build(name, tmp_path / "m")
    result = run(source, tmp_path / "out", f"{recipe} | pack(format=awq)")
    assert result.plan.steps[-1].payload_bytes == open_checkpoint(result.out).nbytes
    for dtype in ("float32", "bfloat16"):
        places = (result.out, step_of(result.out, "quantize.rtn"))
        packed, canonical = (model.build(open_checkpoint(place), dtype) for place in places)
        assert torch.equal(logits(packed), logits(canonical))
