"""Benchmark: a stream pass over a checkpoint of a hundred gigabytes whose data are holes, beside reading the same bytes.

    python tests/benchmarks/sparse.py [--gigabytes 100] [--recipe 'quantize.rtn(scheme=w2a16g64) | pack(format=native)']

A Mixtral of the released 8x7B's shapes with as many blocks as the size asks for; 32 blocks are the released model, 93 GB in bf16.
The input takes no disk and reads as zeros; what is written is as large as ever, so the run is refused if it would leave less than
--spare gigabytes free. Reading: the same files into one buffer, in a process of its own. Status 1 if the peak is over 1 GB, or over
what the plan has predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from huge import sparse

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
READ = """
import sys
from pathlib import Path
buffer = memoryview(bytearray(8 << 20))
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
"""


def tensors(blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a Mixtral of so many blocks."""
    hidden, inner, vocabulary, kv = 4096, 14336, 32000, 1024
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(blocks):
        block = {
            f"self_attn.{name}_proj.weight": (rows, hidden) for name, rows in zip("qkvo", (hidden, kv, kv, hidden), strict=True)
        }
        block |= {"block_sparse_moe.gate.weight": (8, hidden)}
        for expert in range(8):
            shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
            block |= {f"block_sparse_moe.experts.{expert}.{name}.weight": shape for name, shape in shapes.items()}
        yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in block.items())
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def measured(*command: str) -> tuple[float, float, int, str]:
    """(wall seconds, CPU seconds, peak resident bytes, stdout) of a process. Ends with its words if it fails."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        # Not Popen.wait: only wait4 tells what this one child has used.
        _, status, used = os.wait4(child.pid, 0)
        child.returncode, seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - started
        said.seek(0)
        text = said.read()
    if child.returncode:
        sys.exit(text[-3000:])
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=100)
    parser.add_argument("--recipe", default="quantize.rtn(scheme=w2a16g64) | pack(format=native)")
    parser.add_argument("--threads", type=int, default=1, help="tensors in memory at a time")
    parser.add_argument("--spare", type=float, default=12, help="gigabytes of disk that stay free")
    parser.add_argument("--scratch", type=Path, help="where input and output lie; they are removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        blocks = max(1, round((args.gigabytes * 1e9 - 0.525e9) / 2.903e9))
        total = sparse(model, {**CONFIG, "num_hidden_layers": blocks}, dict(tensors(blocks)), max(1, blocks // 2))
        command = (sys.executable, "-P", "-m", "compress")
        how = ("--threads", str(args.threads))
        planned = json.loads(measured(*command, "plan", str(model), "-p", args.recipe, "--json", *how)[3].splitlines()[-1])
        free, need = shutil.disk_usage(scratch).free, planned["added_disk_bytes"]
        if free - need < args.spare * 1e9:
            sys.exit(f"{need / 1e9:.1f} GB would be written and {free / 1e9:.1f} GB are free: fewer --gigabytes")
        read = measured(sys.executable, "-c", READ, str(model))
        ours = measured(*command, "run", str(model), str(out), "-p", args.recipe, "--quiet", "--no-report", *how)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{blocks} blocks of Mixtral-8x7B, {total / 1e9:.1f} GB in bf16, holes; {args.recipe}: {written / 1e9:.2f} GB")
    for name, (seconds, used, peak, _) in {"read": read, "compress run": ours}.items():
        print(
            f"  {name:13} {seconds:8.1f} s wall  {used:8.1f} s CPU  {total / seconds / 1e9:6.2f} GB/s  peak {peak / 1e9:.2f} GB"
        )
    print(f"  ratio: {ours[0] / read[0]:.1f} times the wall seconds of reading, {ours[1] / read[1]:.1f} times its CPU seconds; "
          f"planned peak {planned['peak_resident_bytes'] / 1e9:.2f} GB")  # fmt: skip
    sys.exit(1 if ours[2] > min(1e9, planned["peak_resident_bytes"]) else 0)


if __name__ == "__main__":
    main()
