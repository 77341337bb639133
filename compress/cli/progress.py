"""Progress: how far a verb is, in named phases; bars on a terminal, else lines.

    quantize.gptq: step 2 of 3
    quantize.gptq: copy 56.73 MB in 0.4 s
    quantize.gptq: solve 12/30 blocks, 0:48, about 1:12 left

A phase has a total of its own, in what its work is even over: bytes where they are moved, blocks where they are solved. How
long the rest will take is told from the pace of the last few reports, not from the whole, of which a part may have been kept.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from compress.cli import console

if TYPE_CHECKING:
    from rich.progress import Progress, Task

Receive = Callable[[dict[str, Any]], None]
EVERY_SECONDS = 30.0
"""Between two lines about one phase."""
_SOON_SECONDS = 1.0
"""A phase that is over before has one line, not two."""
_SAMPLES, _APART_SECONDS = 16, 0.5
"""Reports that a pace is taken from, and how far they are apart at least."""
_WIDE = 100
"""Columns from which on a bar has room for tokens a second."""


class Phase:
    """One phase of a step; `at` are seconds of a monotonic clock."""

    def __init__(self, name: str, at: float) -> None:
        self.name, self.began, self.ended = name, at, 0.0
        self.done, self.total, self.unit, self.beside = 0.0, 0.0, "", ""
        self._samples = deque([(at, 0.0)], maxlen=_SAMPLES)

    def move(self, event: dict[str, Any], at: float) -> None:
        """Takes what an event says."""
        if event["event"] == "train":
            self.done, self.total, self.unit = event["number"], event["steps"], "steps"
            self.beside = f"loss {event['loss']:.4f}"
        else:
            self.unit = event.get("unit", "bytes")
            done, total = ("done", "total") if "unit" in event else ("done_bytes", "total_bytes")
            self.done, self.total = event[done], event[total]
        if event.get("kept"):
            # What an earlier run has done goes by at once, and says nothing of the rest.
            self._samples.clear()
        if not self._samples or at - self._samples[-1][0] >= _APART_SECONDS:
            self._samples.append((at, self.done))
        if self.done >= self.total:
            self.ended = at

    def left(self, at: float) -> float | None:
        """Seconds until its end, at the pace of late; None where nothing says, as in the first hundredth."""
        (last, done), first, reports = self._samples[-1], self._samples[0], len(self._samples) - 1
        moved, took = done - first[1], last - first[0]
        if moved <= 0 or took <= 0 or done < self.total / 100:
            # The first files to be opened say nothing of the rest.
            return None
        waited, rest = at - last, self.total - done
        if waited <= took / reports:
            return max(0.0, rest * took / moved - waited)
        # The next report is late: it tells of a slower pace before it is there.
        step = moved / reports
        return max(0.0, rest - step) * (took + waited) / (moved + step)

    @property
    def said(self) -> str:
        """`12/30 blocks`, `153.90/269.03 MB`, `40%`; only the total at the end, and nothing where nothing is counted."""
        if not self.unit:
            return ""
        if self.unit == "%":
            return f"{self.done:.0f}%"
        if self.unit == "bytes":
            done, total = console.size(self.done), console.size(self.total)
            done = done.removesuffix(total[total.index(" ") :])
            return total if self.ended else f"{done}/{total}"
        return f"{self.total:.0f} {self.unit}" if self.ended else f"{self.done:.0f}/{self.total:.0f} {self.unit}"

    def line(self, at: float) -> str:
        """All of it in one line."""
        said = f"{self.name} {self.said}".rstrip()
        if self.ended:
            return f"{said} in {seconds(self.ended - self.began)}"
        left = self.left(at)
        about = f", about {clock(left)} left" if left is not None else ""
        return f"{said}, {clock(at - self.began)}{about}" + (f", {self.beside}" if self.beside else "")


def clock(spent: float) -> str:
    """`0:48`, `1:02:03`."""
    whole = round(spent)
    hours = f"{whole // 3600}:{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02d}"


def seconds(spent: float) -> str:
    """`0.9 s`, and from a minute on as on a clock."""
    return f"{spent:.1f} s" if spent < 60 else clock(spent)


class Show(Protocol):
    """What draws phases; called under one lock."""

    def step(self, words: str) -> None:
        """A step begins or ends."""

    def phase(self, phase: Phase, event: dict[str, Any], at: float) -> None:
        """A phase has moved."""

    def tick(self, phase: Phase | None, words: str, at: float) -> None:
        """A while has gone by."""


class Lines:
    """A line when a step begins and ends, one for each phase, and every while for long ones."""

    def __init__(self, every: float = EVERY_SECONDS) -> None:
        self.every, self.told, self.last = every, "", time.monotonic()

    def _say(self, words: str) -> None:
        self.last = time.monotonic()
        print(words, file=sys.stderr, flush=True)

    def step(self, words: str) -> None:
        self._say(words)

    def phase(self, phase: Phase, event: dict[str, Any], at: float) -> None:
        late = at - self.last >= self.every if self.told == phase.name else at - phase.began >= _SOON_SECONDS
        if phase.ended or late:
            self.told = phase.name
            self._say(phase.line(at))

    def tick(self, phase: Phase | None, words: str, at: float) -> None:
        if at - self.last >= self.every * 0.9:
            self._say(phase.line(at) if phase is not None else words)


class Bars:
    """A bar for each phase of the step that is on, with what is done of it and the time that is left."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.tasks = progress, dict[int, Any]()

    def step(self, words: str) -> None:
        while self.tasks:
            self.progress.remove_task(self.tasks.popitem()[1])

    def phase(self, phase: Phase, event: dict[str, Any], at: float) -> None:
        if id(phase) not in self.tasks:
            self.tasks[id(phase)] = self.progress.add_task(phase.name, phase=phase)
        if event["event"] == "train" and self.progress.console.width >= _WIDE:
            phase.beside += f", {event['tokens_per_second']:,.0f} tokens/s"
        self.progress.update(self.tasks[id(phase)], completed=phase.done, total=phase.total)

    def tick(self, phase: Phase | None, words: str, at: float) -> None:
        pass


class Follower:
    """Follows a run's events, which come from several threads, and tells a Show of them."""

    def __init__(self, show: Show) -> None:
        self.show, self.lock = show, threading.RLock()
        self.began = self.mark = time.monotonic()
        """When the run began, and when what is over was."""
        self.steps: list[str] = []
        self.number = 0
        self.doing = ""
        self.now: Phase | None = None

    def receive(self, event: dict[str, Any]) -> None:
        """Takes an event."""
        kind, at = event["event"], time.monotonic()
        with self.lock:
            if kind == "plan":
                self.steps = event["steps"]
            elif kind == "begin":
                self._begin(event["step"], at)
            elif kind == "step":
                self._end(at)
                self.show.step(f"{event['name']}: done in {seconds(event['seconds'])}")
                self.doing = ""
            elif kind in ("progress", "train"):
                self._move(event, at)
            else:
                console.remarks(event)

    def _begin(self, name: str, at: float) -> None:
        self._end(at)
        # Steps that were kept have no beginning.
        self.number = next((n for n, step in enumerate(self.steps, 1) if n > self.number and step == name), self.number + 1)
        self.doing, self.mark = name, at
        self.show.step(f"{name}: step {self.number}" + (f" of {len(self.steps)}" if self.steps else ""))

    def _move(self, event: dict[str, Any], at: float) -> None:
        step, phase = event["step"], event.get("phase", "")
        name = step
        if phase not in ("", step):
            # A pass may leave its work to another, whose name is not that of the step.
            self.doing = self.doing or step
            name = f"{self.doing}: {phase}"
        if self.now is not None and self.now.name != name:
            self._end(at)
        if self.now is None:
            self.now = Phase(name, self.mark)
        self.now.move(event, at)
        self.show.phase(self.now, event, at)
        if self.now.ended:
            self._end(at)

    def _end(self, at: float) -> None:
        self.now, self.mark = None, at

    def tick(self) -> None:
        """Told now and then, whether or not anything has happened."""
        at = time.monotonic()
        with self.lock:
            self.show.tick(self.now, f"{self.doing or 'still at work'}: {clock(at - self.mark)}", at)


def shares(receive: Receive, step: str, phase: str) -> Callable[[float], None]:
    """What receives how far a phase is as a share of 1."""
    last = 0

    def tell(share: float) -> None:
        nonlocal last
        if (now := int(100 * share)) != last:
            last = now
            receive({"event": "progress", "step": step, "phase": phase, "done": now, "total": 100, "unit": "%"})

    return tell


@contextmanager
def waiting(step: str, phase: str, quiet: bool) -> Iterator[None]:
    """Tells of a phase that says nothing of how far it is."""
    with events(False, quiet) as receive:
        told = {"event": "progress", "step": step, "phase": phase, "total": 1, "unit": ""}
        receive({**told, "done": 0})
        yield
        receive({**told, "done": 1})


@contextmanager
def events(as_json: bool, quiet: bool) -> Iterator[Receive]:
    """A receiver of a run's events: JSON lines on stdout, bars on a terminal, lines where stderr is none, or nothing."""
    if as_json:

        def tell(event: dict[str, Any]) -> None:
            console.json_line(event)
            if event["event"] == "code":
                console.remarks(event)

        yield tell
    elif quiet or sys.stderr is None:
        yield console.remarks
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield Follower(bars).receive
    else:
        with ticking(Follower(Lines()), EVERY_SECONDS) as follower:
            yield follower.receive


@contextmanager
def ticking(follower: Follower, every: float) -> Iterator[Follower]:
    """Lets a follower know of the time, from a thread of its own."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(every):
            follower.tick()

    thread = threading.Thread(target=tick, daemon=True, name="progress")
    thread.start()
    try:
        yield follower
    finally:
        over.set()
        thread.join()


@contextmanager
def _bars() -> Iterator[Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class Left(ProgressColumn):
        """What is done, and the time that is left; at the end the time that it took."""

        def render(self, task: Task) -> Text:
            phase: Phase = task.fields["phase"]
            at = time.monotonic()
            left = phase.left(at)
            when = clock(phase.ended - phase.began) if phase.ended else f"{clock(left)} left" if left is not None else ""
            return Text(", ".join(filter(None, (phase.said, when, "" if phase.ended else phase.beside))), no_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), Left())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as drawn:
        yield Bars(drawn)
