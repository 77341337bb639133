"""Benchmark: methods of quantization at equal bytes, on trained weights: perplexity and KL to the source.

    python tests/benchmarks/methods.py MODEL --calibrate TEXT.jsonl [...] --texts TEXT.jsonl [...] [--budget 4 3 2.5 2] [--seeds 3]

The first row of a budget sets it, and the others take about as many bytes. Budgets are named after the bits of its codes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from quality import measured, report
from transformers.utils import logging

from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.context import Context
from compress.errors import CompressError
from compress.pipeline.entry import enter
from compress.pipeline.plan import PlanOptions, make_plan
from compress.pipeline.run import run_recipe
from compress.spec.recipe import parse_one_liner

MIX = "[w2a16g{g}, w3a16g{g}, w4a16g{g}, w8a16g{g}]"
BUDGETS = {
    "4": (
        "gptq(scheme=w4a16g32)", "rtn(scheme=w4a16g32, clip=mse)", "rtn(scheme=nf4g32, clip=mse)", "gptq(scheme=nf4g32)",
        "rtn(scheme=fp4g32, clip=mse)", "gptq(scheme=fp4g32)", "rtn(scheme=mxfp4)", "gptq(scheme=mxfp4)", "rtn(scheme=nvfp4)",
        "gptq(scheme=nvfp4)", f"llm_mq(mode=abs, size={{bytes}}B, schemes={MIX.format(g=32)})",
        "gptq(scheme=w3a16g32) | quantize.lorc(bpw=1.0)", "loftq(scheme=w3a16g32, rank=4, clip=mse)",
    ),
    "3": (
        "gptq(scheme=w3a16g32)", "rtn(scheme=w3a16g32, clip=mse)", "gptq(scheme=nf3g32)",
        f"llm_mq(mode=abs, size={{bytes}}B, schemes={MIX.format(g=32)})", "gptq(scheme=w3a16g64) | quantize.lorc(bpw=0.25)",
        "gptq(scheme=w2a16g32) | quantize.lorc(bpw=1.0)", "gptq(scheme=w2a16g32) | quantize.lorc(bpw=1.0, weighted=true)",
        "loftq(scheme=w2a16g32, rank=4, clip=mse)",
    ),
    "2.5": (
        "gptq(scheme=w2a16g16)", "rtn(scheme=w2a16g16, clip=mse)", "gptq(scheme=nf2g16)",
        f"llm_mq(mode=abs, size={{bytes}}B, schemes={MIX.format(g=32)})", "gptq(scheme=w2a16g32) | quantize.lorc(bpw=0.5)",
        "gptq(scheme=w2a16g32) | quantize.lorc(bpw=0.5, weighted=true)",
    ),
    "2": (
        "gptq(scheme=w2a16g32)", "rtn(scheme=w2a16g32, clip=mse)", "gptq(scheme=nf2g32)",
        f"llm_mq(mode=abs, size={{bytes}}B, schemes={MIX.format(g=64)})", "gptq(scheme=w2a16g64) | quantize.lorc(bpw=0.25)",
        "gptq(scheme=w2a16g64) | quantize.lorc(bpw=0.25, weighted=true)",
    ),
}  # fmt: skip


def refused(recipe: str, source: Checkpoint) -> bool:
    """Whether a row cannot be had of this model; says why."""
    parsed = parse_one_liner(recipe)
    try:
        make_plan(parsed, source, enter(parsed, source)[0], PlanOptions(1))
    except CompressError as error:
        print(f"left out: {recipe.partition('| ')[2]}: {error.problems[0].got}")
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--budget", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--ragged", choices=("divide", "channel"), default="divide")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=11_776)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    logging.disable_progress_bar()
    calibrate = f"calibrate(data=[{', '.join(args.calibrate)}], samples={args.samples}, length={args.length})"
    source = open_checkpoint(args.model)
    for budget in args.budget:
        recipes = [f"{calibrate} | quantize.{row.replace(')', f', ragged={args.ragged})', 1)}" for row in BUDGETS[budget]]
        with tempfile.TemporaryDirectory() as scratch:
            first = run_recipe(parse_one_liner(recipes[0]), source, Path(scratch) / "first", Context())
            recipes = [recipe.replace("{bytes}", str(first.plan.steps[-1].disk_bytes)) for recipe in recipes]
            recipes = [recipe for recipe in recipes if not refused(recipe, source)]
        report(
            f"{args.model.name}, {budget} bits", *measured(args.model, args.texts, recipes, args.tokens, args.length, args.seeds)
        )


if __name__ == "__main__":
    main()
