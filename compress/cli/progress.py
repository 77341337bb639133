"""Progress: of a command, in named phases, as bars on a terminal, else lines.

    quantize.gptq: step 2 of 3
    quantize.gptq: copy 56.73 MB in 0.4 s
    quantize.gptq: solve 12/30 blocks, 0:48, about 1:12 left

A phase has a total of its own, in a unit whose steps take about equally long: bytes for copies, blocks for solving. The time
that is left is estimated from the last few reports, not from the whole phase, part of which an earlier run may have done.
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
"""Seconds between two lines about one phase."""
_SOON_SECONDS = 1.0
"""A phase that takes less time than this gets one line, not two."""
_SAMPLES, _APART_SECONDS = 16, 0.5
"""How many reports the pace is computed from, and how far they are apart at least."""
_WIDE = 100
"""Columns of a terminal from which a bar has room for tokens a second."""


class Phase:
    """One phase of a step; `at` are seconds of a monotonic clock."""

    def __init__(self, name: str, at: float) -> None:
        self.name, self.began, self.ended = name, at, 0.0
        self.done, self.total, self.unit, self.extra = 0.0, 0.0, "", ""
        self._samples = deque([(at, 0.0)], maxlen=_SAMPLES)

    def move(self, event: dict[str, Any], at: float) -> None:
        """Updates the phase from an event."""
        if event["event"] == "train":
            self.done, self.total, self.unit = event["number"], event["steps"], "steps"
            self.extra = f"loss {event['loss']:.4f}"
        else:
            self.unit = event.get("unit", "bytes")
            done, total = ("done", "total") if "unit" in event else ("done_bytes", "total_bytes")
            self.done, self.total = event[done], event[total]
        if event.get("kept"):
            # Work that an earlier run did is skipped at once, and says nothing about the pace.
            self._samples.clear()
        if not self._samples or at - self._samples[-1][0] >= _APART_SECONDS:
            self._samples.append((at, self.done))
        if self.done >= self.total:
            self.ended = at

    def left(self, at: float) -> float | None:
        """Estimated seconds until its end, at the recent pace; None while that is unknown, as in the first hundredth."""
        (last, done), first, reports = self._samples[-1], self._samples[0], len(self._samples) - 1
        moved, took = done - first[1], last - first[0]
        if moved <= 0 or took <= 0 or done < self.total / 100:
            # Opening the first files says nothing about the pace.
            return None
        waited, rest = at - last, self.total - done
        if waited <= took / reports:
            return max(0.0, rest * took / moved - waited)
        # The next report is overdue, so the pace is already slower than the reports say.
        step = moved / reports
        return max(0.0, rest - step) * (took + waited) / (moved + step)

    @property
    def said(self) -> str:
        """`12/30 blocks`, `153.90/269.03 MB`, `40%`; at the end only the total; empty for a phase without a unit."""
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
        """The phase as one line."""
        said = f"{self.name} {self.said}".rstrip()
        if self.ended:
            return f"{said} in {seconds(self.ended - self.began)}"
        left = self.left(at)
        about = f", about {clock(left)} left" if left is not None else ""
        return f"{said}, {clock(at - self.began)}{about}" + (f", {self.extra}" if self.extra else "")


def clock(spent: float) -> str:
    """`0:48`, `1:02:03`."""
    whole = round(spent)
    hours = f"{whole // 3600}:{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02d}"


def seconds(spent: float) -> str:
    """`0.9 s`; from a minute on `1:02`."""
    return f"{spent:.1f} s" if spent < 60 else clock(spent)


class Show(Protocol):
    """Draws phases; called under one lock."""

    def step(self, words: str) -> None:
        """A step begins or ends."""

    def phase(self, phase: Phase, event: dict[str, Any], at: float) -> None:
        """A phase has moved."""

    def tick(self, phase: Phase | None, words: str, at: float) -> None:
        """Called at regular intervals."""


class Lines:
    """Prints a line when a step begins and ends, one for each phase, and further ones during long phases."""

    def __init__(self, every: float = EVERY_SECONDS) -> None:
        self.every, self.reported, self.last = every, "", time.monotonic()

    def _say(self, words: str) -> None:
        self.last = time.monotonic()
        print(words, file=sys.stderr, flush=True)

    def step(self, words: str) -> None:
        self._say(words)

    def phase(self, phase: Phase, event: dict[str, Any], at: float) -> None:
        late = at - self.last >= self.every if self.reported == phase.name else at - phase.began >= _SOON_SECONDS
        if phase.ended or late:
            self.reported = phase.name
            self._say(phase.line(at))

    def tick(self, phase: Phase | None, words: str, at: float) -> None:
        if at - self.last >= self.every * 0.9:
            self._say(phase.line(at) if phase is not None else words)


class Bars:
    """Draws a bar for each phase of the current step, with the work done and the time left."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.tasks = progress, dict[int, Any]()

    def step(self, words: str) -> None:
        while self.tasks:
            self.progress.remove_task(self.tasks.popitem()[1])

    def phase(self, phase: Phase, event: dict[str, Any], at: float) -> None:
        if id(phase) not in self.tasks:
            self.tasks[id(phase)] = self.progress.add_task(phase.name, phase=phase)
        if event["event"] == "train" and self.progress.console.width >= _WIDE:
            phase.extra += f", {event['tokens_per_second']:,.0f} tokens/s"
        self.progress.update(self.tasks[id(phase)], completed=phase.done, total=phase.total)

    def tick(self, phase: Phase | None, words: str, at: float) -> None:
        pass


class Follower:
    """Receives a run's events, which come from several threads, and calls a Show."""

    def __init__(self, show: Show) -> None:
        self.show, self.lock = show, threading.RLock()
        self.began = self.mark = time.monotonic()
        """When the run began, and when the last phase ended."""
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
        # Steps that an earlier run finished send no event when they begin.
        self.number = next((n for n, step in enumerate(self.steps, 1) if n > self.number and step == name), self.number + 1)
        self.doing, self.mark = name, at
        self.show.step(f"{name}: step {self.number}" + (f" of {len(self.steps)}" if self.steps else ""))

    def _move(self, event: dict[str, Any], at: float) -> None:
        step, phase = event["step"], event.get("phase", "")
        name = step
        if phase not in ("", step):
            # A pass may delegate its work to another one, so the phase's pass is not always the step's.
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
        """Called at regular intervals, whether or not an event has come."""
        at = time.monotonic()
        with self.lock:
            self.show.tick(self.now, f"{self.doing or 'still at work'}: {clock(at - self.mark)}", at)


def shares(receive: Receive, step: str, phase: str) -> Callable[[float], None]:
    """A function that takes the progress of a phase, from 0 to 1, and sends it as events in percent."""
    last = 0

    def tell(share: float) -> None:
        nonlocal last
        if (now := int(100 * share)) != last:
            last = now
            receive({"event": "progress", "step": step, "phase": phase, "done": now, "total": 100, "unit": "%"})

    return tell


@contextmanager
def waiting(step: str, phase: str, quiet: bool) -> Iterator[None]:
    """Shows a phase that does not report its progress."""
    with events(False, quiet) as receive:
        event = {"event": "progress", "step": step, "phase": phase, "total": 1, "unit": ""}
        receive({**event, "done": 0})
        yield
        receive({**event, "done": 1})


@contextmanager
def events(as_json: bool, quiet: bool) -> Iterator[Receive]:
    """A receiver of a run's events: JSON lines on stdout, bars on a terminal, else lines on stderr, or nothing if quiet."""
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
    """Calls a follower's `tick` regularly, from a thread."""
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
        """The work done and the time left; at the end the time that it took."""

        def render(self, task: Task) -> Text:
            phase: Phase = task.fields["phase"]
            at = time.monotonic()
            left = phase.left(at)
            when = clock(phase.ended - phase.began) if phase.ended else f"{clock(left)} left" if left is not None else ""
            return Text(", ".join(filter(None, (phase.said, when, "" if phase.ended else phase.extra))), no_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), Left())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as drawn:
        yield Bars(drawn)
