"""`compress push`: an artifact to the Hub, with everything checked first."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.progress import events, waiting

if TYPE_CHECKING:
    from compress.context import Context
    from compress.hub.push import Prepared, Pushed
    from compress.hub.recipe import PlannedPush
    from compress.spec.push import PushOptions


def register(app: typer.Typer) -> None:
    app.command("push")(command)


@guarded
def command(
    artifact: Annotated[Path, typer.Argument(help="The directory of an artifact.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="The repository, OWNER/NAME; made if it is not there.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    revision: Annotated[str, typer.Option("--revision", metavar="BRANCH", help="A branch, or refs/pr/N.")] = "main",
    pr: Annotated[bool, typer.Option("--pr", help="Propose a pull request; one that is open is gone on with.")] = False,
    message: Annotated[
        str, typer.Option("--message", metavar="TEXT", help="First line of the commit, or title of the pull request.")
    ] = "Upload by compress",
    license_: Annotated[
        str, typer.Option("--license", metavar="ID", help="The licence, if the source names none: apache-2.0, mit, other, ...")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be pushed, and write nothing.")
    ] = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified",
            help="Push although no reader has verified these bytes; the card says so.",
            rich_help_panel=options.DANGER,
        ),
    ] = False,
    threads: options.Threads = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Push ARTIFACT to the Hub, with its card.

    A reader must have verified these bytes (`compress verify ARTIFACT --reader NAME`), and the licence of the source is carried
    over. Run again, it goes on where it was, and pushes nothing twice. The login is huggingface_hub's: `hf auth login`.
    """
    given = {
        "repo": repo_id, "private": private, "revision": revision, "pr": pr, "message": message, "license": license_,
        "unverified": unverified,
    }  # fmt: skip
    chosen = parsed(given)
    from compress.context import Context
    from compress.hub.push import prepare
    from compress.threads import available, compute_threads

    cores = threads or available()
    with compute_threads(cores):
        with events(False, quiet or json_) as receive:
            prepared = prepare(artifact, chosen, note, Context(threads=cores, events=receive))
        if dry_run:
            print(as_json(facts(prepared))) if json_ else show(prepared)
            return
        pushed = upload(prepared, quiet or json_)
    if json_:
        print(as_json({**facts(prepared), **pushed.__dict__}))
    elif not quiet:
        report(prepared, pushed)


def parsed(given: dict[str, Any]) -> PushOptions:
    """The options of a command line. Raises UsageError."""
    from compress.errors import UsageError
    from compress.pipeline.resolve import resolve_push
    from compress.spec.recipe import Line

    chosen, problems = resolve_push(Line("push", given, "compress push"))
    if chosen is None:
        raise UsageError(problems)
    return chosen


def note(text: str) -> None:
    """Prints what a user must see."""
    print(f"note: push: {text}", file=sys.stderr)


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """The library's own bars on a terminal, with the time that is left; else one line when it is done."""
    from huggingface_hub import utils

    if sys.stderr is not None and sys.stderr.isatty() and not quiet:
        yield
        return
    with utils.disable_progress_bars(), waiting("push", "upload", quiet):  # type: ignore[attr-defined]
        yield


def upload(prepared: Prepared, quiet: bool) -> Pushed:
    """Pushes, and shows how far it is."""
    from compress.hub.push import push

    with _bars(quiet):
        return push(prepared, note)


def after_run(planned: PlannedPush, out: Path, ctx: Context, quiet: bool, json_: bool) -> None:
    """Pushes the output of a run. Raises CompressError, after saying how to go on."""
    from compress.errors import CompressError
    from compress.hub.recipe import prepare_output

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    try:
        with events(json_, quiet) as receive:
            prepared = prepare_output(planned, out, tell, replace(ctx, events=receive))
        pushed = upload(prepared, quiet or json_)
    except CompressError:
        if not json_:
            note(f"{out} is complete; the same command goes on, and so does {command_of(planned.options, out)}")
        raise
    if json_:
        ctx.tell("pushed", **pushed.__dict__)
    elif not quiet:
        report(prepared, pushed)


def command_of(chosen: PushOptions, out: Path) -> str:
    """The command that pushes as a recipe does."""
    words = ["compress", "push", str(out), chosen.repo]
    for name, value in chosen.model_dump(exclude={"repo", "reader"}, exclude_defaults=True).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def facts(prepared: Prepared) -> dict[str, Any]:
    """A push that has been checked, as JSON."""
    target, contents = prepared.target, prepared.contents
    return {
        "repo": target.repo, "revision": target.revision, "exists": target.exists, "private": target.private,
        "pull_request": prepared.options.pr, "user": target.user, "files": prepared.sizes, "bytes": sum(prepared.sizes.values()),
        "removed": prepared.stale, "message": prepared.options.message, "readers": list(contents.readers),
        "licence": contents.licence, "gated": prepared.gated, "metadata": prepared.metadata,
    }  # fmt: skip


def as_json(found: dict[str, Any]) -> str:
    """One JSON object; metadata in YAML may hold dates."""
    return json.dumps(found, ensure_ascii=False, default=str)


def show(prepared: Prepared) -> None:
    """Prints what would be pushed."""
    from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

    target, sizes = prepared.target, prepared.sizes
    console.fact("where", where(prepared))
    console.fact("login", target.user)
    console.fact("licence", licence(prepared))
    console.fact("verified", ", ".join(prepared.contents.readers) or "by no reader; the card says so")
    if prepared.gated:
        console.fact("gated", f"{prepared.gated}, the base model: its terms hold for what is pushed; the card says so")
    console.table(("file", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()])
    for name in prepared.stale:
        console.fact("removed", f"{name}, of an earlier push")
    whole = f"{len(sizes)} files, {console.size(sum(sizes.values()))}"
    console.fact("commit", f"'{prepared.options.message}': {whole}, without those that are there already; one commit")
    print("metadata of README.md:")
    for line in yaml_dump(prepared.metadata, sort_keys=False).splitlines():
        print(f"    {line}")
    print("nothing was written: --dry-run")


def licence(prepared: Prepared) -> str:
    """The licence in words."""
    found = prepared.contents.licence
    ids = found["license"]
    return str(found.get("license_name") or (ids if isinstance(ids, str) else ", ".join(ids)))


def where(prepared: Prepared) -> str:
    """The repository in words."""
    target = prepared.target
    kind = "private" if target.private else "public"
    there = f"a {kind} repository that is there" if target.exists else f"a new {'private ' if target.private else ''}repository"
    way = "by a new pull request" if target.proposes else f"at {target.revision}"
    return f"{target.repo}, {there}, {way}"


def report(prepared: Prepared, pushed: Pushed) -> None:
    """Prints what has been pushed."""
    if not pushed.fresh:
        print(f"up to date: {pushed.url}")
        return
    if prepared.gated:
        console.fact("gated", f"{prepared.gated}, the base model: its terms hold for what was pushed; the card says so")
    console.fact("licence", licence(prepared))
    console.fact("verified", ", ".join(prepared.contents.readers) or "by no reader; the card says so")
    for name in prepared.stale:
        console.fact("removed", f"{name}, of an earlier push")
    console.fact("commit", pushed.commit)
    print(f"pushed:   {pushed.url}")
