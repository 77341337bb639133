"""Benchmark: rtn + pack over a synthetic 1.1 B model, beside llm-compressor's model_free_ptq.

    python tests/benchmarks/stream.py [--peer PYTHON] [--keep DIR] [--layers 22]

Each side runs in a process of its own, alternating, imports left out of the time, and reports its peak resident
memory. PYTHON is the interpreter of an environment that has llm-compressor. Weights are random: this measures
time, bytes and memory, and says nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import json, sys, time
from pathlib import Path
import torch, transformers.models.llama.modeling_llama
from transformers.models.auto import modeling_auto
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner
recipe = parse_one_liner("quantize.rtn(scheme=w4a16g128) | pack(format=compressed-tensors)")
took = {}
start = time.perf_counter()
def note(event):
    if event["event"] == "step":
        took[event["name"]] = round(event["seconds"], 2)
result = run_recipe(recipe, open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), Context(events=note))
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "bytes": result.plan.steps[-1].payload_bytes, "steps": took,
                  "planned_peak": result.plan.peak_bytes}))
"""
PEER = """
import json, sys, time
import torch, transformers
from llmcompressor import model_free_ptq
start = time.perf_counter()
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="W4A16", ignore=["lm_head", "re:.*embed_tokens.*", "re:.*norm.*"],
               max_workers=2, device="cpu")
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def synthetic(folder: Path, layers: int) -> Path:
    """A Llama of 2048 / 5632, 32 heads, 4 kv heads, 32000 tokens, untied, bf16, in shards of five layers."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    hidden, ffn, vocabulary, kv = 2048, 5632, 32000, 256
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": vocabulary,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
              "mlp.down_proj": (hidden, ffn)}  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()

    shards, names = [{"model.embed_tokens.weight": (vocabulary, hidden)}], {}
    for start in range(0, layers, 5):
        shard = {}
        for i in range(start, min(layers, start + 5)):
            shard.update({f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()})
            shard.update(
                {f"model.layers.{i}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
            )
        shards.append(shard)
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)})
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: random(*shape) for name, shape in shard.items()}, folder / file, {"format": "pt"})
        names.update(dict.fromkeys(shard, file))
    total = sum((folder / file).stat().st_size for file in set(names.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    return folder


def measure(python: str, code: str, source: Path, out: Path) -> dict[str, float]:
    """One run in a process of its own."""
    done = subprocess.run([python, "-c", code, str(source), str(out)], capture_output=True, text=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".steps"), ignore_errors=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="a Python that has llm-compressor")
    parser.add_argument("--keep", type=Path, help="where the synthetic model is kept between runs")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = args.keep or Path(scratch) / "source"
        if not source.exists():
            synthetic(source, args.layers)
        source_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        rows: dict[str, list[dict[str, float]]] = {"compress": [], "llm-compressor": []}
        for _ in range(args.rounds):
            rows["compress"].append(measure(sys.executable, OURS, source, Path(scratch) / "ours"))
            if args.peer:
                rows["llm-compressor"].append(measure(args.peer, PEER, source, Path(scratch) / "theirs"))
    print(
        f"device: CPU; source {source_bytes / 1e9:.2f} GB bf16, {args.layers} layers of 2048 / 5632; W4A16 g128; best of {args.rounds}"
    )
    best = {}
    for name, runs in rows.items():
        if runs:
            best[name] = min(runs, key=lambda run: run["seconds"])
            print(f"{name:15} {best[name]['seconds']:6.2f} s  {source_bytes / best[name]['seconds'] / 1e9:5.2f} GB/s  "
                  f"peak {best[name]['peak'] / 1e9:.2f} GB  {json.dumps({k: v for k, v in best[name].items() if k not in ('seconds', 'peak')})}")  # fmt: skip
    if args.peer:
        ours, theirs = best["compress"], best["llm-compressor"]
        print(f"ratio: {ours['seconds'] / theirs['seconds']:.2f} of its time, {ours['peak'] / theirs['peak']:.2f} of its memory")


if __name__ == "__main__":
    main()
