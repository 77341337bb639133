"""llama.cpp's speed on the same model in as many bits.

It runs in a process of its own, on the same machine. Its file is made from the dense model by rounding to nearest, in a type of
GGUF that has the bits of most packed weights: speed does not depend on what codes say. Embeddings and head stay as they are, as
they do in a packed model by default.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.context import Context
from compress.errors import FormatError, MachineError, UsageError
from compress.evaluate.bench import DECODE, PROMPT, Settings, Speed
from compress.evaluate.readers import HERE, reader_named
from compress.evaluate.readers.environment import clean_variables, ensure
from compress.kernels.native.modules import PackedWeight
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoint.reader import Checkpoint

NAME = "llama.cpp"
TYPES = {2: "q2_k", 3: "q3_k", 4: "w4a16g32", 5: "w5a16g32", 6: "q6_k", 8: "w8a16g32"}
"""Bits -> schemes that are types of GGUF: Q2_K, Q3_K, Q4_0, Q5_0, Q6_K and Q8_0."""
_SECONDS = 3600


def scheme_for(model: nn.Module) -> str:
    """The scheme with the bits of most of a model's packed weights. Raises UsageError for a model without codes."""
    found: Counter[int] = Counter()
    for module in model.modules():
        if isinstance(module, PackedWeight) and module.work.state.scheme is not None:
            found[module.work.state.scheme.bits] += module.work.rows * module.work.columns
    if not found:
        raise UsageError("--peers", "a model in codes", "none of its weights is")
    return TYPES[found.most_common(1)[0][0]]


def speeds(dense: Checkpoint, scheme: str, settings: Settings, tell: Callable[[str], None]) -> list[Speed]:
    """Speeds with one prompt. Raises CompressError if it cannot be installed, or does not take the model."""
    environment = reader_named(NAME).environment
    assert environment is not None
    python = ensure(environment(), tell)
    with tempfile.TemporaryDirectory(prefix="compress-llama.cpp-") as scratch:
        tell(f"packing {dense.name} for {NAME} in {scheme}")
        run_recipe(parse_one_liner(f"quantize.rtn(scheme={scheme}) | pack(format=gguf)"), dense, Path(scratch, "out"), Context())
        tell(f"timing {NAME}")
        numbers = (torch.get_num_threads(), settings.prompt, settings.new, settings.rounds, settings.seed)
        command = [
            str(python),
            "-P",
            str(HERE / "time_llama_cpp.py"),
            str(Path(scratch, "out", "model.gguf")),
            *map(str, numbers),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=clean_variables(), timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise MachineError(NAME, "speeds", f"none in {_SECONDS} s", "take fewer --new-tokens") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        got = said[-1] if said else f"status {done.returncode}"
        raise FormatError(f"{dense.name}, timed by {NAME}", "a model that it runs", got, "leave out --peers")
    found = json.loads(done.stdout.splitlines()[-1])
    how = f"{scheme} in GGUF, by xllamacpp {found['version']}"
    return [Speed(NAME, 1, phase, tuple(found["rates"][key]), how) for phase, key in ((PROMPT, "prompt"), (DECODE, "decode"))]
