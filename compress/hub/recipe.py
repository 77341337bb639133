"""Recipe: its last line, `push:`, checked before anything is run.

push: {repo: OWNER/NAME, private: true}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from compress.checkpoint.reader import README, Checkpoint, open_checkpoint
from compress.context import Context
from compress.contract.pass_base import Pass, WeightPass
from compress.errors import Problem, RecipeError, UsageError
from compress.evaluate.readers import READERS, reader_named
from compress.evaluate.records import keep_reader, verified_by
from compress.evaluate.verify import as_record, read_with, token_ids
from compress.hub.card import fields, licence_of
from compress.hub.contents import DENSE, reader_of
from compress.hub.messages import Tell
from compress.hub.push import Prepared, prepare
from compress.hub.target import Target, target_of
from compress.pipeline.resolve import resolve, resolve_push
from compress.spec.push import PushOptions
from compress.spec.recipe import Recipe


@dataclass(frozen=True)
class PlannedPush:
    """What will be pushed where, once the recipe has run."""

    options: PushOptions
    target: Target
    licence: str
    reader: str
    """The reader that verifies it first; empty with `unverified`."""


def planned_push(recipe: Recipe, source: Checkpoint, tell: Tell) -> PlannedPush | None:
    """The push of a recipe, None if it has none. Raises CompressError for one that could not be made: nothing has run yet."""
    if recipe.push is None:
        return None
    passes = resolve(recipe)
    options, _ = resolve_push(recipe.push)
    assert options is not None
    where = recipe.push.where or "push"
    reader = _reader(options, passes[-1], where)
    licence, wrong = _licence(source, options)
    if wrong:
        named = {"--license": "push.license"}
        raise UsageError(replace(problem, where=f"{where}: {named.get(problem.where, problem.where)}") for problem in wrong)
    return PlannedPush(options, target_of(options, tell), str(licence.get("license_name") or licence["license"]), reader)


def _licence(source: Checkpoint, options: PushOptions) -> tuple[dict[str, object], list[Problem]]:
    """The licence of the source, by its own README or by what its manifest or the Hub says of it."""
    if source.manifest is not None:
        return licence_of(source.manifest.source.licence_fields(), {}, source.manifest.source.licence, options.license)
    return licence_of(fields(source.path / README), {}, source.origin.get("licence"), options.license)


def _reader(options: PushOptions, last: Pass, where: str) -> str:
    """The reader that will verify what the last pass makes. Raises RecipeError for one that does not read it."""
    fmt = last.target_format() if isinstance(last, WeightPass) else None
    form = fmt.name if fmt is not None else DENSE
    if options.unverified:
        return ""
    chosen = options.reader or reader_of(form)
    if form not in reader_named(chosen).formats:
        able = [name for name, reader in READERS.items() if form in reader.formats]
        raise RecipeError(f"{where}: push.reader", f"one that reads {form}: {', '.join(able)}", f"'{chosen}'", "leave it out")
    return chosen


def prepare_output(planned: PlannedPush, out: Path, tell: Tell, ctx: Context) -> Prepared:
    """Has a reader verify the output of a run, unless one has done so, and prepares its push. Raises CompressError."""
    if planned.reader and not verified_by(out):
        checkpoint = open_checkpoint(out)
        try:
            ids, manifest = token_ids(checkpoint), checkpoint.manifest
        finally:
            checkpoint.close()
        assert manifest is not None
        keep_reader(out, manifest.fingerprint, planned.reader, as_record(read_with(planned.reader, out, ids, tell)))
    return prepare(out, planned.options, tell, ctx)
