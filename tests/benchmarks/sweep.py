"""Benchmark: calibrate + gptq + pack, beside llm-compressor's GPTQ, on the same tokens: time, memory, error.

    python tests/benchmarks/sweep.py --model DIR --text TRAIN.jsonl --scheme w4a16g64 --samples 32 --length 256 [--peer PYTHON]
    python tests/benchmarks/sweep.py --blocks 2 --scheme w4a16g128 --samples 16 --length 512 [--peer PYTHON]

Without --model a Llama of 2048 / 5632 with 4 kv heads and random weights is made, which measures time, memory and error
on its own tokens, and says nothing of quality. Each side runs in a process of its own; imports, and the peer's loading of
the model, are left out. Reconstruction error: |(W - W') x| / |W x| over all quantized weights, x from the source model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEER_NAME = "llm-compressor"
OURS = """
import json, sys, time
from pathlib import Path
import torch, transformers.models.llama.modeling_llama
from transformers.models.auto import modeling_auto
import compress.executors.sweep, compress.corpus, compress.numerics.gptq
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner
source, out, ids, samples, length, scheme, options = sys.argv[1:8]
torch.ones(64, 64) @ torch.ones(64, 64)
recipe = f"calibrate(data='{ids}', samples={samples}, length={length}) | quantize.gptq(scheme={scheme}{options}) | pack"
spent, start = {}, time.perf_counter()
def note(event):
    if event["event"] == "step":
        spent[event["name"]] = {"all": round(event["seconds"], 2), **{k: round(v, 2) for k, v in event.get("spent", {}).items()}}
result = run_recipe(parse_one_liner(recipe), open_checkpoint(Path(source)), Path(out), Context(events=note))
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "planned_peak": result.plan.peak_bytes, "spent": spent}))
"""
PEER = """
import json, sys, time
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
source, out, ids, samples, length, scheme = sys.argv[1:7]
bits, group = scheme[1:].split("a16g")
rows = load_file(ids)["input_ids"][: int(samples), : int(length)].tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
weights = {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
start = time.perf_counter()
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=int(length), num_calibration_samples=int(samples))
seconds = time.perf_counter() - start
model.save_pretrained(out, save_compressed=True)
saved = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "with_saving": saved}))
"""
ERROR = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
source, ids, samples, length, *outs = sys.argv[1:]
def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
model, moments = load(source), {}
linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
def watch(name):
    def hook(module, args):
        x = args[0].reshape(-1, args[0].shape[-1])
        moments[name] = moments.get(name, 0) + x.T @ x
    return hook
for name, module in linears.items():
    module.register_forward_pre_hook(watch(name))
with torch.no_grad():
    for rows in load_file(ids)["input_ids"][: int(samples), : int(length)].split(8):
        model.model(input_ids=rows)
    errors = []
    for out in outs:
        other = load(out)
        with torch.no_grad():  # packed weights expand in the first forward
            other(input_ids=torch.ones(1, 2, dtype=torch.long))
        lost = norm = 0.0
        for name, module in linears.items():
            w, h = module.weight, moments[name]
            d = w - other.get_submodule(name).weight.float()
            lost, norm = lost + float((d @ h * d).sum()), norm + float((w @ h * w).sum())
        errors.append((lost / norm) ** 0.5)
        del other
print(json.dumps(errors))
"""


def synthetic(folder: Path, blocks: int) -> Path:
    """The model of the stream benchmark, with fewer blocks, and a tokenizer that the peer asks for and does not use."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    sys.path.insert(0, str(Path(__file__).parent))
    from stream import synthetic as make

    make(folder, blocks)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b", pad_token="b").save_pretrained(folder)
    return folder


def token_file(path: Path, model: Path, text: Path | None, samples: int, length: int) -> Path:
    """The same ids for both sides: drawn by calibrate's corpus, or random ones for a model without a tokenizer."""
    import torch
    from safetensors.torch import save_file

    if text is None:
        ids = torch.randint(3, 32000, (samples, length), generator=torch.Generator().manual_seed(0))
    else:
        from compress.corpus import CorpusSpec, build

        ids = build(CorpusSpec(data=(str(text),), samples=samples, length=length), model, 0).tensors["input_ids"].long()
    save_file({"input_ids": ids}, path)
    return path


def measure(python: str, code: str, *arguments: object) -> Any:
    """One process; the last line it prints."""
    done = subprocess.run([python, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--scheme", default="w4a16g128")
    parser.add_argument("--options", default="", help="more of quantize.gptq, e.g. 'sweeps=0'; several sets with a blank between")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--peer", help="a Python that has llm-compressor")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = args.model or synthetic(folder / "source", args.blocks)
        ids = token_file(folder / "ids.safetensors", model, args.text, args.samples, args.length)
        common = (ids, args.samples, args.length, args.scheme)
        runs: dict[str, list[Any]] = {}
        outs: dict[str, Path] = {}
        for number in range(args.rounds):
            sides = [(f"compress {options}".strip(), sys.executable, OURS, options) for options in ["", *args.options.split()]]
            sides += [(PEER_NAME, args.peer, PEER, "")] if args.peer else []
            for name, python, code, options in sides:
                outs[name] = folder / f"{name}{number}"
                more = f", {options}" if options else ""
                runs.setdefault(name, []).append(measure(python, code, model, outs[name], *common, more))
                shutil.rmtree(folder / f"{name}{number}.steps", ignore_errors=True)
        errors = measure(sys.executable, ERROR, model, ids, args.samples, args.length, *outs.values())
    label = args.model.name if args.model else f"{args.blocks} random blocks of 2048 / 5632, 4 kv heads"
    print(f"device: CPU; {label}, {args.scheme}, {args.samples} x {args.length} tokens; best of {args.rounds}")
    best = {name: {**min(runs[name], key=lambda run: run["seconds"]), "error": error} for name, error in zip(outs, errors)}
    for name, run in best.items():
        more = json.dumps({key: value for key, value in run.items() if key not in ("seconds", "peak", "error")})
        ratios = ""
        if args.peer and name != PEER_NAME:
            words = [("seconds", "time"), ("peak", "memory"), ("error", "error")]
            ratios = "; " + ", ".join(f"{run[key] / best[PEER_NAME][key]:.2f} of its {word}" for key, word in words)
        print(f"{name}: {run['seconds']:.2f} s, peak {run['peak'] / 1e9:.2f} GB, error {run['error']:.5f}{ratios}  {more}")


if __name__ == "__main__":
    main()
