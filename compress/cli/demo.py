"""`compress demo`: five stages on the embedded model, each measured, offline."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.progress import events
from compress.errors import CompressError, Problem
from compress.spec.recipe import Line, Recipe, override, print_value
from compress.spec.recipe_file import read

if TYPE_CHECKING:
    from compress.evaluate.stages import Measured
    from compress.pipeline.run import Result

RECIPE = "five_stages"
LENGTH = 256
PRUNED, QUANTIZED, DISTILLED, ROUNDED = "prune.wanda", "quantize.gptq", "distill.logits", "quantize.rtn"
CALLED = {
    "source": "source", PRUNED: "pruned", QUANTIZED: "quantized", DISTILLED: "distilled", "pack": "packed",
    ROUNDED: "rtn instead of gptq",
}  # fmt: skip
HEAD = ("stage", "tensor bytes", "bits/weight", "perplexity", "KL to source", "same top-1", "seconds")


def register(app: typer.Typer) -> None:
    app.command("demo")(command)


@guarded
def command(
    out: Annotated[Path, typer.Argument(help="Where the artifact goes; its picture beside it.")] = Path("compress-demo"),
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prune, quantize, train and pack the embedded model (0.9 M parameters) and measure each stage.

    Exit status 1 if GPTQ is not better than rounding to nearest, or if training does not lower the KL.
    """
    started = time.perf_counter()
    import compress.demo

    home = Path(compress.demo.__file__).parent
    result, stages = measured(home, out, quiet)
    picture = drawn(result, stages)
    wrong = missing(stages)
    if not quiet:
        report(result, stages)
        if not wrong:
            print(f"margins:  {margins(stages)}")
        print(f"where:    {result.out}")
        print(f"picture:  {picture}")
        print(f"reader:   {reader(home, result.out)}")
        print(f"took:     {time.perf_counter() - started:.0f} s")
        print(f"next:     compress show {result.out}")
    if wrong:
        raise CompressError(wrong)


def recipe_of(home: Path) -> Recipe:
    """The installed recipe, calibrated and trained on the embedded text; evaluation uses another one."""
    from compress.cli.complete import installed

    text = print_value(str(home / "text" / "calibration.jsonl"))
    return override(read(installed()[RECIPE]), [f"calibrate.data={text}", f"{DISTILLED}.data={text}"])


def rounding(recipe: Recipe) -> Recipe:
    """A recipe that rounds to nearest instead of GPTQ, to the same scheme."""
    line = next(line for line in recipe.lines if line.name == QUANTIZED)
    shared = ("scheme", "ragged", "targets", "skip")
    return Recipe((Line(ROUNDED, {option: value for option, value in line.options.items() if option in shared}),))


def measured(home: Path, out: Path, quiet: bool) -> tuple[Result, list[Measured]]:
    """Runs the recipe, and rounding to nearest over its pruned stage; compares every stage with the source."""
    from transformers.utils import logging

    from compress.checkpoint.reader import open_checkpoint
    from compress.context import Context
    from compress.evaluate.stages import measure_stages, place_of
    from compress.layerwise.eval_windows import token_windows
    from compress.pipeline.run import Options, run_recipe
    from compress.report.write_card import ensure_card

    logging.disable_progress_bar()
    recipe = recipe_of(home)
    windows = token_windows(home / "model", home / "text" / "evaluation.jsonl", LENGTH)
    with tempfile.TemporaryDirectory(prefix="compress-demo-") as scratch, events(False, quiet) as receive:
        ctx = Context(seed=recipe.seed, events=receive)
        source = open_checkpoint(home / "model")
        result = run_recipe(recipe, source, out, ctx, Options(describe=lambda made: ensure_card(made.out)))
        pruned = open_checkpoint(place_of(result, PRUNED))
        nearest = run_recipe(rounding(recipe), pruned, Path(scratch) / "rtn", ctx)
        stages = [*measure_stages(result, source, windows), *measure_stages(nearest, source, windows)[1:]]
    return result, stages


def drawn(result: Result, stages: list[Measured]) -> Path:
    """Draws the stages beside OUT, not in it, because the manifest has a digest of every file in OUT."""
    from compress import plots as picture

    path = result.out.with_name(f"{result.out.name}.svg")
    title = f"{RECIPE} on the embedded model"
    picture.stages(path, [stage.drawn(CALLED[stage.name]) for stage in stages], title)
    return path


def report(result: Result, stages: list[Measured]) -> None:
    """The table, the recipe, and the protocol."""
    console.table(HEAD, [row(stage) for stage in stages])
    quality = stages[1].quality
    assert quality is not None
    count = len(result.manifest.weights)
    print(f"recipe:   {RECIPE} (compress recipes show {RECIPE}), calibrated and trained on the embedded calibration text")
    print(f"protocol: embedded evaluation text, {quality.protocol}")
    print(f"          KL(source || stage) in nats per token; bits over the {count} weights that are pruned and quantized")


def row(stage: Measured) -> tuple[str, ...]:
    """A stage as cells of the table."""
    quality, name = stage.quality, CALLED[stage.name]
    cells = (name, f"{stage.nbytes:,}", f"{stage.bits:.3f}", f"{stage.perplexity.value:.2f}")
    if quality is None:
        return (*cells, "-", "-", "-")
    return (*cells, f"{quality.kl.value:.4f} +- {quality.kl.error:.4f}", f"{quality.top1.value:.1%}", f"{stage.seconds:.1f}")


def _kls(stages: list[Measured]) -> tuple[float, float, float]:
    """KL of GPTQ, of rounding to nearest, and after distillation."""
    found = {stage.name: stage.kl for stage in stages}
    return found[QUANTIZED], found[ROUNDED], found[DISTILLED]


def margins(stages: list[Measured]) -> str:
    """How much GPTQ and distillation lower the KL."""
    gptq, nearest, distilled = _kls(stages)
    return (
        f"GPTQ: KL {gptq:.3f} instead of {nearest:.3f} by rounding to nearest (x{gptq / nearest:.2f}); "
        f"distillation: {gptq:.3f} -> {distilled:.3f} ({distilled / gptq - 1:+.0%})"
    )


def missing(stages: list[Measured]) -> list[Problem]:
    """A problem for each margin that was not reached."""
    gptq, nearest, distilled = _kls(stages)
    do = "the table shows every stage; report it with the machine that it ran on"
    wrong = []
    # Written so that a KL of NaN counts as a missing margin.
    if not gptq < nearest:
        wrong.append(Problem("margin of GPTQ", f"a KL below {nearest:.4f}, that of rounding to nearest", f"{gptq:.4f}", do))
    if not distilled < gptq:
        wrong.append(Problem("margin of distillation", f"a KL below {gptq:.4f}, that before it", f"{distilled:.4f}", do))
    return wrong


def reader(home: Path, out: Path) -> str:
    """Loads the artifact with transformers itself and compares logits with ours."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return "not checked: pip install 'compress-llm[readers]' for compressed-tensors"
    import torch
    from transformers import AutoModelForCausalLM

    from compress.checkpoint.reader import open_checkpoint
    from compress.layerwise.eval_windows import token_windows
    from compress.layerwise.model import build

    ids = token_windows(home / "model", home / "text" / "evaluation.jsonl", LENGTH, LENGTH)
    # Hides the reader's progress bars; its errors are raised all the same.
    with torch.inference_mode(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        theirs = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)(input_ids=ids).logits
        ours = build(open_checkpoint(out), "bfloat16")(input_ids=ids).logits
    difference = float((theirs - ours).abs().max())
    return f"transformers loads it; largest logit difference from our own reading: {difference:g}"
