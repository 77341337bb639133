"""`compress run`: a recipe over a model, from a file or a one-liner."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.progress import events
from compress.contract.discover import names_passes
from compress.errors import InputError, Problem, RecipeError, UsageError
from compress.spec.byte_size import parse_size
from compress.spec.recipe import Recipe, override, parse_one_liner
from compress.threads import available

if TYPE_CHECKING:
    from compress.context import Context
    from compress.contract.pass_base import Pass
    from compress.hub.recipe import PlannedPush
    from compress.pipeline.run import OtherResultError, Result


def register(app: typer.Typer) -> None:
    app.command("run")(command)


@guarded
def command(
    model: options.Model,
    out: options.Out,
    recipe: options.Recipe = None,
    passes: options.Passes = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    allow_skips: options.AllowSkips = None,
    shard_size: options.ShardSize = "5GB",
    dtype: options.Dtype = "auto",
    device: options.On = "auto",
    threads: options.Threads = None,
    fail_on: options.FailOn = None,
    steps: options.Steps = None,
    keep: options.Keep = True,
    report: options.Report = True,
    allow_nonfinite: options.AllowNonfinite = False,
    allow_dtype_mismatch: options.AllowDtype = False,
    allow_overcommit: options.AllowOvercommit = False,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Run a recipe: MODEL goes in, OUT comes out.

    `compress run MODEL OUT recipe.yaml`, or `compress run MODEL OUT -p 'quantize.rtn(scheme=w4a16g64) | pack'`.
    A MODEL of `-` is the one that the recipe names.
    """
    found = chosen_recipe(recipe, passes, set_)
    flags = RunFlags(
        seed, allow_skips, shard_size, dtype, device, threads, fail_on, allow_nonfinite, allow_dtype_mismatch, allow_overcommit,
        trust_remote_code, json_, quiet, steps, keep, report,
    )  # fmt: skip
    execute(found, model, out, flags)


def chosen_recipe(recipe: str | None, passes: str | None, set_: list[str] | None) -> Recipe:
    """The recipe that the command line means: a file, an installed one, or a one-liner; with `--set` applied."""
    if (recipe is None) == (passes is None):
        raise UsageError("run", "a recipe file or -p 'passes'", "both" if recipe else "neither", "see `compress recipes ls`")
    if passes is not None:
        found = parse_one_liner(passes)
    else:
        from compress.cli.complete import installed
        from compress.cli.recipes import opened

        assert recipe is not None
        if names_passes(recipe) and recipe not in installed() and not Path(recipe).is_file():
            do = f"give them with -p: -p {shlex.quote(recipe)}"
            raise UsageError(f"recipe '{recipe}'", "a recipe file, or the name of a recipe that is installed", "passes", do)
        found = opened(recipe)
    return override(found, set_ or [])


@dataclass(frozen=True)
class RunFlags:
    """The flags that `run` and the command of every pass share."""

    seed: int | None
    allow_skips: list[str] | None
    shard_size: str
    dtype: str
    device: str
    threads: int | None
    fail_on: list[str] | None
    allow_nonfinite: bool
    allow_dtype_mismatch: bool
    allow_overcommit: bool
    trust_remote_code: bool
    json_: bool
    quiet: bool
    steps: list[Path] | None = None
    keep: bool = True
    report: bool = True


def execute(recipe: Recipe, model: str, out: Path, flags: RunFlags) -> None:
    """Runs a recipe and prints the result; shared by `run` and the command of every pass."""
    limit, json_, quiet = parse_size(flags.shard_size), flags.json_, flags.quiet
    refuse_placeholders(recipe)
    from compress.pipeline.resolve import resolve

    refuse_missing(resolve(recipe))  # mistakes in a recipe are told before torch is imported
    if not quiet:
        console.presets(recipe)
    from compress import device as devices
    from compress.checkpoint.source import open_source
    from compress.pipeline.run import Options, OtherResultError, run_recipe
    from compress.report.page import report_path
    from compress.report.write_card import ensure_card

    def describe(result: Result) -> None:
        ensure_card(result.out)
        if flags.report:
            write_page(result, report_path(result.out))

    devices.resolve(flags.device, int(os.environ.get("WORLD_SIZE", "1")))
    if model == "-":
        if recipe.model is None:
            raise RecipeError("model", "a model in the recipe, or as an argument", "neither")
        model = recipe.model
    elif recipe.model not in (None, model) and not quiet:
        print(f"note: the recipe names {recipe.model}; MODEL on the command line wins", file=sys.stderr)
    opts = Options(
        tuple(flags.allow_skips or ()), flags.allow_nonfinite, flags.allow_dtype_mismatch, limit, tuple(flags.fail_on or ()),
        flags.allow_overcommit, tuple(flags.steps or ()), flags.keep, describe,
    )  # fmt: skip
    planned = checked_push(recipe, model, flags)
    source = open_source(model, flags.trust_remote_code)
    with events(json_, quiet) as receive:
        seed = recipe.seed if flags.seed is None else flags.seed
        ctx = context(seed, flags.dtype, flags.device, flags.threads, receive)
        try:
            result = run_recipe(recipe, source, out, ctx, opts)
        except OtherResultError as error:
            if not error.solved:
                raise
            said = ["--seed", str(ctx.seed)] if flags.seed is not None else []
            said += ["--dtype", flags.dtype] if flags.dtype != "auto" else []
            raise InputError(with_command(error, out, ["run", model, str(out), "-p", recipe.one_liner(), *said])) from None
    if not ctx.is_main:
        return
    if not quiet:
        ctx.tell("done", **summary(result)) if json_ else report(result, flags.steps or [])
    if planned is not None:
        from compress.cli.push import after_run

        after_run(planned, result.out, ctx, quiet, json_)


def checked_push(recipe: Recipe, model: str, flags: RunFlags) -> PlannedPush | None:
    """The push that a recipe ends with, checked before anything is fetched or run; None without one."""
    if recipe.push is None or int(os.environ.get("RANK", "0")):
        return None
    from compress.checkpoint.source import open_headers
    from compress.cli.push import note
    from compress.hub.recipe import planned_push
    from compress.pipeline.entry import enter
    from compress.pipeline.plan import PlanOptions, make_plan

    headers = open_headers(model, flags.trust_remote_code)
    made, dense_view = enter(recipe, headers, flags.allow_dtype_mismatch)
    make_plan(recipe, headers, made, PlanOptions(allow_skips=tuple(flags.allow_skips or ())), dense_view=dense_view)
    return planned_push(recipe, headers, note)


def write_page(result: Result, place: Path) -> None:
    """Writes the report of a run, unless the output and its report are there. Says so where there is no place for it."""
    from compress.errors import MachineError
    from compress.report.page import write_report

    try:
        if result.fresh or not place.exists():
            write_report([result.out], place)
    except MachineError as error:
        print(f"note: no report: {error.problems[0].where}: {error.problems[0].got}", file=sys.stderr)


def with_command(error: OtherResultError, out: Path, run: list[str]) -> list[Problem]:
    """The problems, with a command that reuses OUT's steps: the given one with another OUT, or `run` for a pass's command."""
    name = f"{out.name}-{error.format or 'other'}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    other = next(path for path in map(out.with_name, names) if not path.exists())
    words = sys.argv[1:] if sys.argv[1:2] == ["run"] else run
    given = [str(other) if Path(word) == out else word for word in words]
    command = shlex.join(["compress", *given, "--steps", str(out)])
    do = f"this takes {error.solved} of {error.steps} steps from there: {command}"
    return [replace(problem, do=do) for problem in error.problems]


def refuse_placeholders(recipe: Recipe) -> None:
    """Raises RecipeError for all placeholders of a recipe at once, with the command that fills them."""
    from compress.cli.recipes import settings, to_set

    if left := to_set(recipe):
        got = "none for " + ", ".join(f"{option} ({word})" for option, word in left.items())
        command = f"{shlex.join(['compress', *sys.argv[1:]])} {settings(left)}"
        do = f"put values of your own behind `=`:\n{command}"
        raise RecipeError("placeholders of the recipe", "a value for each", got, do)


def refuse_missing(passes: list[Pass]) -> None:
    """Raises InputError for every file of texts that a pass names and that does not exist."""
    problems = [
        Problem(
            f"{pass_.pass_name()}.data: {source}", "a file", "no such file", "check the path; before a dataset's name write hf:"
        )
        for pass_ in passes
        for source in getattr(pass_, "data", None) or ()
        if Path(source).suffix and not source.startswith("hf:") and not Path(source).expanduser().exists()
    ]
    if problems:
        raise InputError(problems)


def context(seed: int, dtype: str, device: str, threads: int | None, receive: object) -> Context:
    """The Context of this process; joins the other ranks under torchrun."""
    from compress.context import Context

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        import torch.distributed as dist

        from compress.device import backends, resolve

        if not dist.is_initialized():
            dist.init_process_group(backends(resolve(device, world)))
    rank, here = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    return Context(seed, threads or available(), device, dtype, rank, world, here < world, receive)  # type: ignore[arg-type]


def summary(result: Result) -> dict[str, object]:
    """The summary of a run as JSON."""
    from compress.report.page import report_path

    last, page = result.plan.steps[-1], report_path(result.out)
    touched = list(result.manifest.weights)
    return {
        "out": str(result.out),
        "fresh": result.fresh,
        "before_bytes": result.plan.source_bytes,
        "after_bytes": last.payload_bytes,
        "bits_per_weight": round(result.plan.bits(last), 4),
        "bits_per_targeted_weight": round(result.plan.bits(last, touched), 4),
        "coverage": result.manifest.coverage,
        "notes": [{"what": n.what, "count": n.count, "reason": n.reason} for n in result.manifest.notes],
        "seconds": round(result.seconds, 2),
        "steps": result.measured,
        "taken": [{"step": one.name, "where": str(one.where)} for one in result.taken],
        "fingerprint": result.manifest.fingerprint,
        "report": str(page) if page.is_file() else None,
    }


def report(result: Result, given: list[Path]) -> None:
    """Prints the summary of a run: where, before, after, bits per weight, what to do next. `given` are --steps."""
    from compress.pipeline.output_paths import steps_folder

    facts = summary(result)
    if not result.fresh:
        print(f"up to date: {result.out}")
        return
    last, coverage = result.plan.steps[-1], result.manifest.coverage
    console.notes(note for note in result.manifest.notes if note.what != "untouched" or "tower" in note.reason)
    before, after = result.plan.source_bytes, last.payload_bytes
    weights = f"{coverage['transformed']} of {coverage['targeted']} weights"
    console.fact("where", str(result.out))
    console.fact("before", console.size(before))
    console.fact("after", f"{console.size(after)} ({after / before:.1%}), {weights}")
    console.fact("bits", f"{facts['bits_per_targeted_weight']} per targeted weight, {facts['bits_per_weight']} over all")
    taken = Counter(one.folder for one in result.taken)
    empty = [path for path in map(Path, map(os.path.abspath, given)) if not {path, steps_folder(path)} & taken.keys()]
    for folder, number in [*taken.items(), *((path, 0) for path in empty)]:
        console.fact("steps", f"{number} of {len(result.plan.steps)} steps taken from {folder}")
    for name, made in result.measured.items():
        if spent := made.get("spent"):
            console.fact("spent", f"{name}: " + ", ".join(f"{word} {seconds:.1f} s" for word, seconds in spent.items()))
    peak = console.size(result.manifest.measured["peak_resident_bytes"])
    console.fact("took", f"{result.seconds:.1f} s, peak memory {peak}")
    if facts["report"]:
        print(f"report:   {facts['report']}")
    # Commands are to be copied, so each is in one line, however long.
    print(f"next:     {next_command(result)}")
    if result.manifest.format != "canonical" and steps_folder(result.out).is_dir():
        print(f"clean:    {shlex.join(['compress', 'clean', str(result.out)])}")


def next_command(result: Result) -> str:
    """The command to run after this one."""
    from compress.checkpoint.reader import CALIBRATION
    from compress.spec.weight_state import State

    out = str(result.out)
    states = {State.parse(record.state).scheme for record in result.manifest.weights.values()}
    if result.manifest.format == "canonical" and not states - {None}:
        if CALIBRATION in result.manifest.files:
            return shlex.join(["compress", "quantize", "gptq", out, f"{out}-w4", "--scheme", "w4a16g128"])
        return shlex.join(["compress", "show", out])
    if result.manifest.format == "canonical":
        return shlex.join(["compress", "pack", out, f"{out}-packed"])
    return shlex.join(["compress", "show", out])
