"""API: `compress.run` and `plan_of`, for a model and a recipe in any form.

A recipe is text (`quantize.rtn(scheme=w4a16g64) | pack`), the path of a file, or a Recipe. A model is a directory or a Hub id, a
Checkpoint, or, for `run`, a model of transformers: its own `save_pretrained` saves it beside the output, and the copy is
removed when the run ends, whether it succeeds or fails.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.checkpoint.source import open_headers, open_source
from compress.context import Context
from compress.contract.discover import names_passes
from compress.contract.step_plan import Plan
from compress.errors import InputError, MachineError, RecipeError, UsageError
from compress.hub.push import push
from compress.hub.recipe import planned_push, prepare_output
from compress.pipeline.entry import enter
from compress.pipeline.plan import PlanOptions, make_plan
from compress.pipeline.run import Options, Result, run_recipe
from compress.report.write_card import ensure_card
from compress.spec.recipe import Recipe, parse_one_liner
from compress.spec.recipe_file import read

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Given = str | os.PathLike[str]


def run(
    recipe: Recipe | Given, source: Checkpoint | PreTrainedModel | Given, out: Given, ctx: Context | None = None,
    options: Options | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
) -> Result:  # fmt: skip
    """Runs a recipe over a model into the directory `out`. Raises CompressError; then nothing is published.

    Without `ctx` this process runs alone, on all its cores, with the recipe's own seed. A model of transformers is saved with
    `tokenizer`, or with the one in the directory that it was loaded from, if it is on this machine; calibration needs one.
    """
    found = recipe_of(recipe)
    ctx = Context(seed=found.seed) if ctx is None else ctx
    options = replace(options or Options(), describe=lambda result: ensure_card(result.out))
    if isinstance(source, Checkpoint):
        return _run(found, source, Path(out), ctx, options)
    if isinstance(source, str | os.PathLike):
        return _run(found, open_source(source), Path(out), ctx, options)
    with _saved(source, Path(os.path.abspath(out)), tokenizer, ctx) as checkpoint:
        return _run(found, checkpoint, Path(out), ctx, options)


def _run(recipe: Recipe, source: Checkpoint, out: Path, ctx: Context, options: Options | None) -> Result:
    """Runs a recipe, and pushes what it makes if the recipe says so."""

    def tell(text: str) -> None:
        ctx.tell("notice", step="push", text=text)

    planned = planned_push(recipe, source, tell) if ctx.is_main else None
    result = run_recipe(recipe, source, out, ctx, options)
    if planned is not None:
        ctx.tell("pushed", **push(prepare_output(planned, result.out, tell, ctx), tell).__dict__)
    return result


def plan_of(
    recipe: Recipe | Given, source: Checkpoint | PreTrainedModel | Given, ctx: Context | None = None,
    options: Options | None = None,
) -> Plan:  # fmt: skip
    """What `run` would make, computed from headers alone: exact bytes, bits, memory, readers. Raises CompressError.

    A model of transformers has no headers, so it is refused.
    """
    found, options = recipe_of(recipe), options or Options()
    ctx = Context(seed=found.seed) if ctx is None else ctx
    if not isinstance(source, Checkpoint | str | os.PathLike):
        do = "save_pretrained it, and give the directory"
        raise UsageError("source", "a directory, a Hub id or a Checkpoint, whose headers are read", type(source).__name__, do)
    checkpoint = source if isinstance(source, Checkpoint) else open_headers(source)
    model, dense_view = enter(found, checkpoint, options.allow_dtype_mismatch)
    chosen = PlanOptions(ctx.threads, options.allow_skips, options.shard_bytes, ctx.dtype)
    return make_plan(found, checkpoint, model, chosen, dense_view=dense_view)


def recipe_of(given: Recipe | Given) -> Recipe:
    """The recipe that a text, a path or a Recipe means. Raises RecipeError."""
    if isinstance(given, Recipe):
        return given
    text = os.fspath(given)
    if isinstance(given, str) and not os.path.isfile(text):
        if names_passes(text):
            return parse_one_liner(text, "recipe")
        if not text.endswith((".yaml", ".yml")):
            expected = "passes, such as 'quantize.rtn(scheme=w4a16g64) | pack', or the path of a recipe file"
            raise RecipeError(f"recipe '{text}'", expected, "neither", "see `compress list` for passes")
    return read(Path(text))


@contextmanager
def _saved(model: Any, out: Path, tokenizer: Any, ctx: Context) -> Iterator[Checkpoint]:
    """A model of transformers as a checkpoint beside `out`, for as long as it is needed."""
    _refuse(model)
    folder = Path(ctx.broadcast(_save(model, out, tokenizer) if ctx.is_main else None))
    origin = str(model.name_or_path or "")
    try:
        checkpoint = open_checkpoint(folder, (Path(origin).name if Path(origin).is_dir() else origin) or type(model).__name__)
        try:
            yield checkpoint
        finally:
            checkpoint.close()
    finally:
        if ctx.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _save(model: Any, out: Path, tokenizer: Any) -> str:
    """Saves a model and its tokenizer into a new directory beside `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{out.name}.source-", dir=out.parent)
    except OSError as error:
        raise MachineError(
            str(out.parent), "a place to save the model", error.strerror or str(error), "choose another OUT"
        ) from None
    try:
        model.save_pretrained(folder)
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            do = "free some space, or choose an OUT on another disk"
            raise MachineError(folder, "room for a copy of the model", error.strerror or str(error), do) from None
        raise
    return folder


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer from where a model was loaded; None if it is not on this machine."""
    from transformers import AutoTokenizer

    if not model.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _refuse(model: Any) -> None:
    """Raises UsageError for anything but a model of transformers, InputError for one whose weights cannot be saved."""
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        do = "give what its merge_and_unload() returns, or the base model"
        raise InputError(f"source: {kind}", "a model without adapters", "one with adapters beside its weights", do)
    if not isinstance(model, PreTrainedModel):
        raise UsageError("source", "a directory, a Hub id, a Checkpoint, or a model of transformers", kind)
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        do = "give the directory that it was loaded from: codes are read from there as they are"
        raise InputError(f"source: {kind}", "dense weights", "a quantized model", do)
    away = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if away:
        got = f"{len(away)} of them on the meta device, such as {away[0]}: not loaded yet, or offloaded"
        raise InputError(f"source: {kind}", "weights in memory", got, "load it without device_map, or give its directory")
