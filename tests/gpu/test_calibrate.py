"""Calibration, gradients and measurements on the device, against the CPU; memory within the plan; kills; how long it takes.

Rehearsed without a GPU (COMPRESS_TEST_DEVICE=cpu) on tensors of the CPU that count as lying on one: tests/rehearsal.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.device import name_of, resolve
from compress.evaluate.diff import difference
from compress.evaluate.perplexity_kl import compare
from compress.executors import sweep
from compress.layerwise.sample import sample
from gpu.cases import DEVICE
from gpu.conftest import tell
from rehearsal import Rehearsal
from support import do, ready_inputs, tiny_llama

REAL = DEVICE == "cuda"
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 256} if REAL else {}
LARGE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
"""As large as a usual model of 135 M parameters."""
RECIPES = {
    "gptq": "quantize.gptq(scheme=w3a16g32)",
    "floats": "quantize.gptq(scheme=nvfp4, sweeps=0)",
    "wanda": "prune.wanda(sparsity=2:4)",
    "awq": "quantize.smooth(scheme=w4a16g32, steps=5) | quantize.rtn(scheme=w4a16g32)",
    "lorc": "quantize.rtn(scheme=w2a16g32) | quantize.lorc(weighted=true, rank=8)",
    "llm_mq": "quantize.llm_mq(bits=3, mode=abs, schemes=[w2a16g32, w3a16g32, w4a16g32], method=rtn, clip=none)",
    "llm_mq by kl": "quantize.llm_mq(bits=3, schemes=[w2a16g32, w3a16g32, w4a16g32], method=rtn)",
    "both": "quantize.gptq(scheme=w3a16g32, feedback=both)",
}


@pytest.fixture(autouse=True)
def device() -> Iterator[Any]:
    with nullcontext() if REAL else Rehearsal() as rehearsal:
        yield rehearsal


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("gpu") / "model", **SIZES)


def calibrated(recipe: str, samples: int = 64, length: int = 128, vocabulary: int = 128) -> str:
    samples, length = (samples, length) if REAL else (6, 24)
    return f"calibrate(data={ready_inputs(samples, length, vocabulary)}, samples={samples}, length={length}) | {recipe}"


def both(source: Path, folder: Path, recipe: str) -> tuple[Manifest, Manifest]:
    """The manifests of a run on the CPU and of one on the device."""
    found = [do(source, folder / name, calibrated(recipe), device=name).manifest for name in ("cpu", "cuda")]
    assert not found[0].device
    assert found[1].device == name_of(resolve("cuda"))
    return found[0], found[1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_does_as_well_there(name: str, source: Path, tmp_path: Path) -> None:
    """Sums are rounded otherwise, so codes may differ; what is lost of weights and of outputs does not, nor do states."""
    here, there = both(source, tmp_path, RECIPES[name])
    assert here.weights.keys() == there.weights.keys()
    for weight, record in here.weights.items():
        other = there.weights[weight]
        assert other.error == pytest.approx(record.error, rel=0.05, abs=1e-4), weight
        if record.output_error is not None:
            assert other.output_error == pytest.approx(record.output_error, rel=0.05, abs=1e-4), weight
    same = [here.weights[weight].state == there.weights[weight].state for weight in here.weights]
    # Two choices of equal worth may change places.
    assert sum(same) >= len(same) - (2 if name.startswith("llm_mq") else 0)


def test_eval_diff_and_generate_say_the_same(source: Path, demo_model: Path, tmp_path: Path) -> None:
    do(source, tmp_path / "w3", "quantize.rtn(scheme=w3a16g32)")
    checkpoints, there = [open_checkpoint(path) for path in (source, tmp_path / "w3")], resolve("cuda")
    windows = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(0))
    found = [compare(*checkpoints, windows, device=place) for place in (torch.device("cpu"), there)]
    for measure in ("perplexity", "source_perplexity", "kl"):
        assert getattr(found[1], measure).value == pytest.approx(getattr(found[0], measure).value, rel=1e-3)
    errors = [difference(*checkpoints, device=place).error for place in ("cpu", there)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-9)
    texts = [sample(open_checkpoint(demo_model), "def f(", 8, device=place) for place in (torch.device("cpu"), there)]
    assert texts[0] == texts[1]


def test_states_that_are_parked_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = calibrated(RECIPES["gptq"] if REAL else RECIPES["wanda"])
    monkeypatch.setattr("compress.layerwise.batches.BATCH_TOKENS", 1024 if REAL else 48)
    whole = do(source, tmp_path / "whole", recipe, device="cuda").manifest
    monkeypatch.setattr(sweep, "HELD_BYTES", 1)
    monkeypatch.setattr(sweep, "BETWEEN_BYTES", 1 << 20 if REAL else 1)
    monkeypatch.setattr("compress.layerwise.hidden_state_offload._SMALLEST", 1)
    assert do(source, tmp_path / "parked", recipe, device="cuda").manifest.digests == whole.digests


KILLED = """
import os, runpy, signal, sys
sys.argv = ["run.py"]
names = runpy.run_path({run!r})
sys.meta_path.insert(0, names["Rooms"]())
sys.path[:0] = [{tests!r}]
from pathlib import Path
from compress.checkpoint.writer import Writer
from support import do
record, count = Writer.record, [0]
def stop(self, *rest):
    count[0] += 1
    if count[0] == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, *rest)
Writer.record = stop
do(Path({source!r}), Path({out!r}), {recipe!r}, device="cuda")
"""


@pytest.mark.skipif(not REAL, reason="a rehearsal ends with its process; tests/test_device.py stops one")
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    recipe, here = calibrated(RECIPES["gptq"]), Path(__file__)
    whole = do(source, tmp_path / "whole", recipe, device="cuda").manifest
    code = KILLED.format(
        run=str(here.with_name("run.py")),
        tests=str(here.parents[1]),
        source=str(source),
        out=str(tmp_path / "out"),
        recipe=recipe,
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-2000:]
    assert do(source, tmp_path / "out", recipe, device="cuda").manifest.digests == whole.digests


@pytest.mark.skipif(not REAL, reason="needs the memory and the time of a GPU")
@pytest.mark.parametrize(
    "recipe", ["quantize.gptq(scheme=w3a16g64)", "quantize.llm_mq(bits=3, schemes=[w2a16g64, w3a16g64, w4a16g64], method=rtn)"]
)
def test_a_model_of_135_million_parameters(recipe: str, tmp_path: Path) -> None:
    """Within the memory of the plan; what it takes is told on the page."""
    model = tiny_llama(tmp_path / "model", **LARGE)
    where = resolve("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(where)
    before, started = torch.cuda.memory_allocated(where), time.perf_counter()
    result = do(model, tmp_path / "out", calibrated(recipe, 64, 512, LARGE["vocab_size"]), device="cuda", dtype="auto")
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated(where) - before
    planned = result.plan.steps[-1].device_bytes
    spent = result.manifest.measured.get("spent", {})
    tell(
        note=f"`{recipe}`, 135 M parameters (random), 64 x 512 tokens: {seconds:.1f} s "
        f"({', '.join(f'{word} {number:.1f}' for word, number in spent.items())}), "
        f"{peak / 1e9:.2f} GB of the GPU's memory at most, {planned / 1e9:.2f} planned"
    )
    assert peak <= planned
