"""Scale: what a plan and a run do for each tensor does not grow with how many there are; checkpoints whose data are holes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint.reader import open_checkpoint
from compress.cli.plan import facts, show
from compress.errors import CompressError
from compress.pipeline.entry import enter
from compress.pipeline.plan import make_plan
from compress.spec.recipe import parse_one_liner
from support import run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import huge

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "vocab_size": 128, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
MIXED = "quantize.rtn(scheme=w8a16g32, targets=[attention]) | quantize.rtn(scheme=w4a16g32, skip=[attention])"
RECIPES = (
    f"{MIXED} | pack", f"{MIXED} | pack(format=gptq)", f"{MIXED} | pack(format=native)",
    "quantize.rtn(scheme=w4a16g32-asym) | pack(format=awq)", "quantize.rtn(scheme=w4a16g32) | pack(format=mlx)",
    "quantize.rtn(scheme=nvfp4) | pack", "quantize.rtn(scheme=w4a16g32-asym) | pack",
    "unpack(to=dense) | quantize.rtn(scheme=w4a16g32) | pack",
)  # fmt: skip
"""Schemes that differ by kind of weight, and formats that take them or refuse each expert by reason."""


def deepseek(folder: Path, experts: int, fp8: bool = False) -> Path:
    """A small DeepSeek-V3 without data."""
    config = {**huge.MODELS["deepseek-v3"][0], **SMALL, "n_routed_experts": experts}
    huge.sparse(folder, config, dict(huge.tensors(config)), 4, fp8)
    return folder


def calls(work: Callable[[], Any]) -> int:
    """How many functions are called, Python's own included."""
    count = 0

    def counting(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counting)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def planned(model: Path, recipe: str) -> None:
    """Everything of `compress plan` but what it prints first."""
    source, parsed = open_checkpoint(model), parse_one_liner(recipe)
    try:
        found, dense_view = enter(parsed, source)
        plan = make_plan(parsed, source, found, dense_view=dense_view)
    except CompressError as error:
        str(error)
        return
    show(plan, "model", False, False, [], {})
    facts(plan, False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plan_grows_with_its_tensors_and_no_faster(recipe: str, tmp_path: Path) -> None:
    few, many = (deepseek(tmp_path / str(experts), experts, "unpack" in recipe) for experts in (16, 128))
    # What is imported or cached for good is not counted.
    planned(few, recipe)
    one, other = (calls(lambda model=model: planned(model, recipe)) for model in (few, many))
    assert other < 8 * one


def test_a_run_grows_with_its_tensors_and_no_faster(tmp_path: Path) -> None:
    """What its main thread calls: reading, journals, manifests, the check of steps that are there, the card."""
    recipe, counts = "quantize.rtn(scheme=w2a16g32) | pack(format=native)", []
    for experts in (4, 8, 64):
        model, out = deepseek(tmp_path / str(experts), experts), tmp_path / f"out{experts}"
        counts.append(calls(lambda model=model, out=out: [run(model, out, recipe), run(model, out, recipe)]))
    # The first run imports what the others have already.
    assert counts[2] < 8 * counts[1]


def test_holes_take_no_disk_and_have_the_released_shapes(tmp_path: Path) -> None:
    """671 billion parameters and 14 of the block that predicts one more token; a trillion."""
    model = deepseek(tmp_path / "model", 16)
    assert sum(file.stat().st_blocks for file in model.iterdir()) * 512 < 300_000
    counts = {name: sum(map(huge.math.prod, dict(huge.tensors(config)).values())) for name, (config, _) in huge.MODELS.items()}
    assert {name: round(count / 1e9) for name, count in counts.items()} == {"deepseek-v3": 684, "kimi-k2": 1026}


@pytest.mark.parametrize("scheme", ["w2a16g32", "w4a16g32-asym", "w3a16g32-min", "nf4g32", "mxfp4", "nvfp4", "fp8"])
def test_a_checkpoint_of_holes_is_quantized(scheme: str, tmp_path: Path) -> None:
    """Groups of zeros alone have no range: their scale is finite and they stay zero."""
    result = run(deepseek(tmp_path / "model", 4), tmp_path / "out", f"quantize.rtn(scheme={scheme}, targets=[linear])")
    assert {record.error for record in result.manifest.weights.values()} == {0.0}
    made = open_checkpoint(tmp_path / "out")
    for name in made.refs:
        if name.endswith((".scale", ".minimum", ".tensor_scale")) and made.refs[name].dtype in ("BF16", "F32"):
            assert bool(made.read(name).isfinite().all()), name
    assert os.path.isdir(tmp_path / "out")
