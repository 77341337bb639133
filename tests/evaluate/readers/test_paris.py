"""SmolLM2-135M, packed for each engine, goes on with the sentence as the source does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.real.model import ANSWER, PROMPT, real_model

from compress.errors import MachineError
from compress.evaluate import readers
from compress.evaluate.readers.environment import Environment, clean_variables, ensure
from support import run

pytestmark = pytest.mark.slow
_HEAD = f"import json, sys\n\nplace, prompt = sys.argv[1], {PROMPT!r}\n"
SCRIPTS = {
    "vllm": """
from vllm import LLM, SamplingParams
model = LLM(place, enforce_eager=True, max_model_len=512, dtype="bfloat16")
text = model.generate(prompt, SamplingParams(temperature=0, max_tokens=2))[0].outputs[0].text
""",
    "llama.cpp": """
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.warmup, settings.n_ctx, settings.n_parallel = place + "/model.gguf", False, 256, 1
# Threads of its that wait spin; beside other work a single one is faster.
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
answer = xllamacpp.Server(settings).handle_completions({"prompt": prompt, "max_tokens": 2, "temperature": 0})
text = answer["choices"][0]["text"]
""",
    "mlx": """
from mlx_lm import generate, load
model, tokenizer = load(place)
text = generate(model, tokenizer, prompt=prompt, max_tokens=2)
""",
}
_GPTQ = "calibrate(samples=32, length=256) | quantize.gptq"
"""Rounded to nearest in 4 bits, the model says " Paris,"."""
CASES: dict[str, tuple[Callable[[], Environment], str]] = {
    "vllm, compressed-tensors": (readers.vllm, f"{_GPTQ}(scheme=w4a16g64) | pack"),
    "vllm, gptq": (readers.vllm, f"{_GPTQ}(scheme=w4a16g64) | pack(format=gptq)"),
    "vllm, awq": (readers.vllm, f"{_GPTQ}(scheme=w4a16g64-asym) | pack(format=awq)"),
    "llama.cpp, gguf": (readers.llama_cpp, "quantize.rtn(scheme=w8a16g32) | pack(format=gguf)"),
    "mlx, mlx": (readers.mlx, f"{_GPTQ}(scheme=w4a16g64-min) | pack(format=mlx)"),
}
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_capital_of_france(case: str, tmp_path: Path) -> None:
    try:
        source = real_model(print)
    except MachineError as error:
        pytest.skip(str(error))
    environment, recipe = CASES[case]
    run(source, tmp_path / "out", recipe)
    code = f"{_HEAD}{SCRIPTS[case.partition(',')[0]]}print('answer:', json.dumps(text))"
    command = [str(ensure(environment(), print)), "-P", "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean_variables(**VARIABLES), timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    (answer,) = (json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("answer: "))
    print(f"{case}: {recipe}: {PROMPT}{answer}")
    # mlx-lm's detokenizer drops the blank in front.
    assert answer.strip() == ANSWER.strip()
