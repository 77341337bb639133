"""Console: numbers and tables as people read them, and progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint


def size(nbytes: float) -> str:
    """`16.0 MB`, in decimal units as disks are sold and the Hub counts."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """Prints a plain table; numbers to the right. Wide cells wrap only on a terminal."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    right = [all(_number(row[i]) for row in cells) and bool(cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()

    if title:
        print(title)
    print(line(head))
    print("  ".join("-" * width for width in widths))
    for row in cells:
        print(line(row))


def notes(found: Iterable[Any]) -> None:
    """Prints counted lines; where something went otherwise than asked, with the first weights that it happened to."""
    from compress.gate import NAMED

    for note in found:
        names = f": {', '.join(note.names[:3])}{' ...' if note.count > 3 else ''}" if note.what in NAMED else ""
        print(f"{note.what}: {note.count} ({note.reason}){names}")


def json_line(event: dict[str, Any]) -> None:
    """Prints an event; in one write, for threads print theirs meanwhile."""
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _number(text: str) -> bool:
    return text[:1].isdigit() or text in ("", "-")


def _remarks(event: dict[str, Any]) -> None:
    """What a person must hear of even when nobody watches the progress."""
    if event["event"] == "damaged":
        print(f"note: {event['where']} was damaged and is made again\n{event['reason']}", file=sys.stderr)
    elif event["event"] == "notice":
        print(f"note: {event['step']}: {event['text']}", file=sys.stderr)
    elif event["event"] == "code":
        _warn_of(event["model"], event["files"])


def warn_of_code(checkpoint: Checkpoint) -> None:
    """Names every Python file that a trusted checkpoint brings, before any is run."""
    from compress.trust import code_of

    _warn_of(checkpoint.name, code_of(checkpoint))


def _warn_of(model: str, files: dict[str, str]) -> None:
    """In red on a terminal; whatever else is not printed, this is."""
    from rich.console import Console

    for file, digest in files.items():
        text = f"warning: Python of {model} is run, by --trust-remote-code: {file}, sha256 {digest}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def events(as_json: bool, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A receiver of a run's events: JSON lines on stdout, a rich progress bar with ETA on a terminal, or nothing."""
    if as_json:

        def tell(event: dict[str, Any]) -> None:
            json_line(event)
            if event["event"] == "code":
                _remarks(event)

        yield tell
        return
    if quiet or not sys.stderr.isatty():
        yield _remarks
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    words = TextColumn("{task.description:<16}")
    moving = Progress(words, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    training = Progress(words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
    with Live(Group(moving, training), console=Console(stderr=True), transient=True):
        tasks: dict[tuple[str, str], Any] = {}

        def receive(event: dict[str, Any]) -> None:
            kind, name = event["event"], event.get("step", "")
            if kind == "progress":
                if (kind, name) not in tasks:
                    tasks[kind, name] = moving.add_task(name, total=event["total_bytes"])
                moving.update(tasks[kind, name], completed=event["done_bytes"])
            elif kind == "train":
                if (kind, name) not in tasks:
                    tasks[kind, name] = training.add_task(name, total=event["steps"], said="")
                said = f"loss {event['loss']:.4f}, {event['tokens_per_second']:,.0f} tokens/s"
                training.update(tasks[kind, name], completed=event["number"], said=said)
            else:
                _remarks(event)

        yield receive
