"""Guard: how every command ends: messages and exit statuses, no tracebacks."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from compress.cli.console import json_line
from compress.errors import CompressError, MachineError, Problem

INTERNAL = 70
STOPPED = 128
"""The exit status is this plus the signal's number, as in shells."""
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory")
"""torch's messages for exhausted memory."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is handled like Ctrl-C."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command; its arguments `json_` and `debug`, if it has them, decide how errors are printed."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        as_json, debug = bool(kwargs.get("json_")), bool(kwargs.get("debug"))
        resumes = "out" in kwargs or "repo_id" in kwargs
        seen: list[KeyboardInterrupt] = []

        def stop_(number: int, frame: Any) -> None:
            seen.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
            raise seen[-1]

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop_)
        try:
            command(*args, **kwargs)
        except CompressError as error:
            if debug:
                raise
            fail(error, as_json)
        except KeyboardInterrupt as stop:
            stopped(stop, as_json, resumes)
        except BrokenPipeError:
            # The reader of our output has closed the pipe; a run may be half done.
            close_output()
            sys.exit(STOPPED + signal.SIGPIPE)
        except Exception as error:
            if seen:
                # During imports, Python and libraries wrap the exception that a signal handler raises.
                stopped(seen[0], as_json, resumes)
            if debug:
                raise
            if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
                do = "give it a machine with more, or close other programs: the same command goes on where it was"
                fail(MachineError("memory", "as much as the plan says", "the system gave no more", do), as_json)
            what = f"internal error: {type(error).__name__}: {error}"
            _say([Problem(what, do="run it again with --debug and report what it prints")], "internal", as_json)
            sys.exit(INTERNAL)

    return wrapper


def stopped(stop: KeyboardInterrupt, as_json: bool = False, resumes: bool = False) -> None:
    """Prints how to resume after Ctrl-C or SIGTERM, and ends the process."""
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    # A second signal must not cut the message.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    command = shlex.join(["compress", *sys.argv[1:]])
    if as_json:
        json_line({"event": "stopped", "signal": number.name, "resume": command if resumes else None})
    elif resumes:
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


def fail(error: CompressError, as_json: bool) -> None:
    """Prints every problem of `error` and ends with its status."""
    _say(error.problems, type(error).__name__, as_json)
    sys.exit(error.exit_status)


def _say(problems: Any, kind: str, as_json: bool) -> None:
    if as_json:
        found = [problem.__dict__ for problem in problems]
        json_line({"event": "error", "kind": kind, "problems": found})
        return
    for problem in problems:
        print(problem if kind == "internal" else f"error: {problem}", file=sys.stderr)
    if len(problems) > 1:
        print(f"{len(problems)} problems", file=sys.stderr)
