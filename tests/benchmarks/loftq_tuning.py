"""LoftQ for fine-tuning: LoRA from its factors, and LoRA from zero over codes of as many bits, by the same steps.

    python tests/benchmarks/loftq_tuning.py MODEL TRAIN.jsonl VALID.jsonl [--scheme w2a16g32] [--rank 16] [--steps 100] [--seeds 3]

Both are trained by PEFT and transformers alone, on the same batches, at each of several rates, of which each side has its best: LoftQ's
base and adapter as `pack(format=peft)` writes them, and the source rounded to nearest (`clip=mse`) with an adapter as PEFT begins it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.layerwise.eval_windows import token_windows
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def models(source: Path, scheme: str, rank: int, scratch: Path) -> dict[str, Path]:
    """The directory of each side's base, made once."""

    def made(model: Path, name: str, recipe: str) -> Path:
        run_recipe(parse_one_liner(recipe), open_checkpoint(model), scratch / name, Context())
        return scratch / name

    adapted = made(source, "loftq", f"quantize.loftq(scheme={scheme}, rank={rank}, clip=mse, ragged=divide) | pack(format=peft)")
    packed = made(source, "packed", f"quantize.rtn(scheme={scheme}, clip=mse, ragged=divide) | pack(format=native)")
    return {"loftq": adapted, "zero": made(packed, "zero", "unpack(to=dense)")}


def begin(name: str, folder: Path, rank: int, seed: int) -> Any:
    """A model with an adapter to train."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name == "loftq":
        return PeftModel.from_pretrained(base, folder / "loftq_init", is_trainable=True)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, task_type="CAUSAL_LM"))


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of windows [count, length], the first token of each not scored."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in windows.split(1)]
    return math.exp(sum(losses) / len(losses))


def train(model: Any, windows: torch.Tensor, steps: int, batch: int, lr: float, seed: int) -> None:
    """AdamW at a rate that falls to zero after a tenth of warm-up."""
    model.train()
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warm = max(1, steps // 10)
    for step in range(steps):
        share = min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        ids = windows[order[torch.arange(step * batch, (step + 1) * batch) % len(order)]]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Prints a table, and one JSON object at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--scheme", default="w2a16g32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = token_windows(args.model, args.train, args.length)
    held = token_windows(args.model, args.valid, args.length, 8192)
    found: dict[str, Any] = {"model": args.model.name, "train": args.train.name, "valid": args.valid.name}
    found |= {"scheme": args.scheme, "rank": args.rank, "tokens": args.steps * args.batch * args.length, "source": {}, "rows": []}
    found["source"] = perplexity(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), held)
    print(f"source: {found['source']:.2f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in models(args.model, args.scheme, args.rank, Path(scratch)).items():
            for lr in args.lr:
                before, after, started = [], [], time.perf_counter()
                for seed in range(args.seeds):
                    model = begin(name, folder, args.rank, seed)
                    before.append(perplexity(model, held))
                    train(model, texts, args.steps, args.batch, lr, seed)
                    after.append(perplexity(model, held))
                row = {
                    "adapter": name, "lr": lr, "before": statistics.mean(before), "after": after, "mean": statistics.mean(after),
                    "seconds": time.perf_counter() - started,
                }  # fmt: skip
                found["rows"].append(row)
                print(
                    f"{name:6} lr {lr:g}: {row['before']:10.2f} -> {row['mean']:8.2f} {[round(x, 2) for x in after]}", flush=True
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
