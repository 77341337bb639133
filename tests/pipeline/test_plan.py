"""Plan: its bytes are the bytes written, from headers only."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.pipeline.plan import PlanOptions, make_plan
from compress.spec.recipe import parse_one_liner
from support import run, step_of, tiny_llama


def files_bytes(directory: Path) -> int:
    return sum(
        f.stat().st_size
        for f in directory.iterdir()
        if f.suffix == ".safetensors" or (f.name.endswith(("config.json", ".index.json")) and "generation" not in f.name)
    )


@pytest.mark.parametrize("recipe", ["quantize.rtn(scheme=w4a16g32) | pack", "quantize.rtn(scheme=w3a16, targets=[linear, head]) | pack",
                                    "quantize.rtn(scheme=w2a16g32-asym) | pack(dequantize=true)", "quantize.rtn(scheme=w8a16g64, ragged=channel)"])  # fmt: skip
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_planned_bytes_are_written_bytes(recipe: str, shard_bytes: int, tiny: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny)
    plan = make_plan(parse_one_liner(recipe), source, resolve(source), PlanOptions(2, shard_bytes=shard_bytes))
    result = run(tiny, tmp_path / "out", recipe, shard_bytes=shard_bytes)
    for number, step in enumerate(plan.steps):
        place = tmp_path / "out" if number == len(plan.steps) - 1 else step_of(tmp_path / "out", step.name)
        assert step.payload_bytes == open_checkpoint(place).nbytes
        assert step.disk_bytes == files_bytes(place)
    assert plan.bits(plan.steps[-1]) == result.plan.bits(result.plan.steps[-1])


def test_no_tensor_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object) -> None:
        raise AssertionError("a plan reads headers only")

    monkeypatch.setattr(Checkpoint, "_fill", read)
    source = open_checkpoint(tiny)
    plan = make_plan(parse_one_liner("quantize.rtn(scheme=w4a16g32) | pack"), source, resolve(source), PlanOptions(2))
    assert {verdict.reader: verdict.loads for verdict in plan.verdicts}["transformers"] == "yes"


def test_bits_count_scales_and_padding(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama(tmp_path / "m"))
    plan = make_plan(parse_one_liner("quantize.rtn(scheme=w4a16g32)"), source, resolve(source), PlanOptions(2))
    assert plan.bits(plan.steps[0], plan.steps[0].transformed) == 4 + 16 / 32
    channel = make_plan(parse_one_liner("quantize.rtn(scheme=w8a16)"), source, resolve(source), PlanOptions(2))
    down = "model.layers.0.mlp.down_proj.weight"
    assert channel.bits(channel.steps[0], [down]) == 8 + 16 / 96


@pytest.mark.parametrize(("scheme", "vllm"), [("w4a16g32", "yes"), ("w3a16g32", "no"), ("w4a16g48", "no"), ("w8a16", "yes")])
def test_reader_matrix(scheme: str, vllm: str, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama(tmp_path / "m", hidden_size=96, intermediate_size=96))
    plan = make_plan(parse_one_liner(f"quantize.rtn(scheme={scheme}) | pack"), source, resolve(source), PlanOptions(2))
    assert {verdict.reader: verdict.loads for verdict in plan.verdicts}["vllm"] == vllm
