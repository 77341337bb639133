"""Signals: Ctrl-C and SIGTERM end a process with the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from types import FrameType
from typing import Any

STOPPED = 128
"""The exit status is this plus the signal's number, as in shells."""
_UNWINDS = 2.0
"""Seconds that a stopped command has to close what it holds."""
_IMPORT = "<frozen importlib._bootstrap>"
"""The file of a frame that imports a module."""
_told = {"json": False, "resumes": False}
_seen: list[KeyboardInterrupt] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is handled like Ctrl-C."""


def answer(as_json: bool = False, resumes: bool = False) -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt; `as_json` and `resumes` say what `stopped` prints.

    While a module is imported they end the process at once: libraries catch everything there, and C++ aborts at an exception
    that it does not expect. Elsewhere Python drops an exception that is raised in a `__del__` or a callback: the process ends
    after 2 s even where nobody sees it.
    """
    _told.update(json=as_json, resumes=resumes)
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _unraisable


def interrupted() -> KeyboardInterrupt | None:
    """The signal that has come, whatever became of its exception."""
    return _seen[0] if _seen else None


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            stopped(_seen[-1])
        frame = frame.f_back
    signal.signal(signal.SIGALRM, lambda *_: stopped(_seen[0]))
    signal.setitimer(signal.ITIMER_REAL, _UNWINDS)
    raise _seen[-1]


def _unraisable(what: Any) -> None:
    if isinstance(what.exc_value, KeyboardInterrupt):
        stopped(what.exc_value)
    sys.__unraisablehook__(what)


def stopped(stop: KeyboardInterrupt) -> None:
    """Prints how to resume after Ctrl-C or SIGTERM, and ends the process."""
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    # A second signal must not cut the message.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(each, signal.SIG_IGN)
    command = shlex.join(["compress", *sys.argv[1:]])
    if _told["json"]:
        from compress.cli.console import json_line

        json_line({"event": "stopped", "signal": number.name, "resume": command if _told["resumes"] else None})
    elif _told["resumes"]:
        print(f"stopped by {number.name}. Nothing is lost; this goes on where it was:\n  {command}", file=sys.stderr)
    else:
        print(f"stopped by {number.name}", file=sys.stderr)
    close_output()
    # The interpreter would wait for threads that still compute; weights that they have not journaled are computed again.
    os._exit(STOPPED + number)


def close_output() -> None:
    """Flushes the output; a closed pipe must not print an error while the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
