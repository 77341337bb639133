"""`compress diff`: how far the weights of two checkpoints are apart."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.cli.progress import events, shares
from compress.threads import compute_threads

if TYPE_CHECKING:
    from compress.evaluate.diff import Difference, Row


def register(app: typer.Typer) -> None:
    app.command("diff")(command)


@guarded
def command(
    a: Annotated[str, typer.Argument(help="A checkpoint in any state: a directory, or a Hub id with @revision.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another one.", metavar="B")],
    worst: Annotated[bool, typer.Option("--worst", help="Worst first, not in stored order.")] = False,
    details: options.Details = False,
    device: options.On = "auto",
    threads: options.Threads = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Print the relative error |A - B| / |A| of every weight that both have, in whatever form it is stored."""
    from compress.checkpoint.source import open_source
    from compress.device import resolve
    from compress.evaluate.diff import difference

    where = resolve(device)
    first, second = open_source(a), open_source(b)
    with compute_threads(threads), events(False, json_) as receive:
        found = difference(first, second, shares(receive, "diff", "compare"), where)
    rows = sorted(found.rows, key=_badness, reverse=True) if worst else list(found.rows)
    if json_:
        print(json.dumps(facts(found, rows), ensure_ascii=False))
    else:
        show(found, rows, details)


def _badness(row: Row) -> float:
    return math.inf if math.isnan(row.error) else row.error


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def facts(found: Difference, rows: list[Row]) -> dict[str, Any]:
    """The difference as JSON; an error that is not finite is null."""
    return {
        "error": _finite(found.error),
        "equal": found.equal,
        "weights": [{"name": r.name, "shape": r.shape, "states": r.states, "error": _finite(r.error)} for r in rows],
        "only": {"a": found.only[0], "b": found.only[1]},
        "shapes": [{"name": name, "a": a, "b": b} for name, (a, b) in found.shapes.items()],
    }


def show(found: Difference, rows: list[Row], details: bool) -> None:
    """Prints the difference as a table, and the weights that could not be compared."""
    head: tuple[str, ...] = ("weight", "A", "B", "weight error")
    cells: list[tuple[str, ...]] = [(row.name, *row.states, f"{row.error:.6f}" if row.lost else "0") for row in rows]
    if details:
        head, cells = (*head, "shape"), [(*cell, "x".join(map(str, row.shape))) for cell, row in zip(cells, rows, strict=True)]
    console.table(head, cells, "A, B: what the weight is there; weight error: |A-B|/|A|")
    for name, (left, right) in found.shapes.items():
        console.fact("error", f"'{name}' is {list(left)} in A, {list(right)} in B: not compared")
    for letter, names in zip("AB", found.only, strict=True):
        for name in names:
            console.fact(f"only {letter}", f"'{name}'")
        if names:
            console.fact(f"only {letter}", f"{len(names)} weights")
    total = f"{found.error:.6f} over {len(rows)} weights, {found.equal} of them equal" if rows else "nothing could be compared"
    console.fact("total", total)
