"""Whole models on the device: loaded by transformers, as large as their file, and speaking as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
import compress.hf
from compress.checkpoint.reader import open_checkpoint
from compress.evaluate import backend_report, bench
from compress.runtime import artifact
from gpu.cases import DEVICE
from support import run, tiny_llama

SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 256,
}  # fmt: skip
NEW = 24
RECIPES = {
    "w4": "quantize.rtn(scheme=w4a16g128, targets=[linear, embeddings, head])",
    "mixed": "quantize.rtn(scheme=nf4g64, outliers=0.005, targets=attention) | quantize.rtn(scheme=fp8, skip=attention)",
    "w3": "quantize.rtn(scheme=w3a16g64-asym)",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("gpu") / "model", **SIZES)


@pytest.fixture(scope="module", params=RECIPES)
def packed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("gpu") / request.param
    run(source, out, f"{RECIPES[request.param]} | pack(format=native)")
    return out


def loaded(path: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, device_map=device, dtype=dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_generates_what_it_generates_on_the_cpu(packed: Path, dtype: str) -> None:
    """Token by token; where two are as good as equal, and only there, the other one may follow."""
    kind = getattr(torch, dtype)
    here, there = loaded(packed, "cpu", torch.float32), loaded(packed, DEVICE, kind)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
    greedy: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = there.generate(ids.to(DEVICE), **greedy).cpu()
    assert found.shape == (2, 9 + NEW)
    logits = here(input_ids=found).logits[:, 8:-1]
    best, taken = logits.max(-1).values, logits.gather(-1, found[:, 9:, None])[..., 0]
    allowed = 2 * bench.ALLOWED[dtype] * logits.abs().max()
    assert float((best - taken).max()) <= allowed
    # What is told apart beyond rounding is the likeliest one; most is.
    assert float((logits.argmax(-1) == found[:, 9:]).float().mean()) > 0.8


def test_memory_after_load_is_that_of_the_file(packed: Path) -> None:
    stored = open_checkpoint(packed).nbytes
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    model = loaded(packed, DEVICE)
    assert bench.tensor_bytes(model) < 1.1 * stored
    if DEVICE == "cuda":
        # Each tensor takes a multiple of 512 bytes.
        count = sum(1 for _ in (*model.parameters(), *model.buffers()))
        assert torch.cuda.memory_allocated() - before < 1.1 * stored + 512 * count


def test_doctor_says_what_a_model_that_is_loaded_has(packed: Path) -> None:
    answers = [backend_report.answer(use) for use in backend_report.artifact_uses(open_checkpoint(packed), DEVICE)]
    told: dict[str | None, int] = {}
    for one in answers:
        told[one.backend] = told.get(one.backend, 0) + one.use.weights
    assert told == artifact.backends(compress.load(packed, device=DEVICE))
    for dtype in backend_report.DTYPES:
        assert all(backend_report.answer(use).backend for use in backend_report.families(dtype, DEVICE))


def test_bench_times_it(packed: Path, source: Path) -> None:
    settings = bench.Settings(prompt=32, new=8, batches=(1, 2), rounds=2, device=DEVICE)
    checkpoints = [open_checkpoint(packed), open_checkpoint(source)]
    bench.check_settings(checkpoints, settings)
    ids = bench.prompts(checkpoints, settings, None)
    subject = bench.load_packed(checkpoints[0], settings)
    assert bench.check(checkpoints[0], subject, ids) < bench.ALLOWED["bfloat16"]
    dense = bench.load_dense(checkpoints[1], settings, subject.model.dtype)
    speeds = bench.timed([subject, dense], ids, settings)
    assert len(speeds) == 8
    assert {speed.how for speed in speeds if speed.phase == bench.DECODE} == {"graph" if DEVICE == "cuda" else "eager"}
