"""Guard: how every command ends: messages and exit statuses, no tracebacks."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

from compress.cli.console import json_line
from compress.cli.signals import STOPPED, answer, close_output, interrupted, stopped
from compress.errors import CompressError, MachineError, Problem

INTERNAL = 70
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory")
"""torch's messages for exhausted memory."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command; its arguments `json_` and `debug`, if it has them, decide how errors are printed."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        as_json, debug = bool(kwargs.get("json_")), bool(kwargs.get("debug"))
        resumes = "out" in kwargs or "repo_id" in kwargs
        answer(as_json, resumes)
        try:
            command(*args, **kwargs)
        except CompressError as error:
            if debug:
                raise
            fail(error, as_json)
        except KeyboardInterrupt as stop:
            stopped(stop)
        except BrokenPipeError:
            # The reader of our output has closed the pipe; a run may be half done.
            close_output()
            sys.exit(STOPPED + signal.SIGPIPE)
        except Exception as error:
            if (signalled := interrupted()) is not None:
                # Python and libraries wrap the exception that a signal handler raises.
                stopped(signalled)
            if debug:
                raise
            if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
                do = "give it a machine with more, or close other programs: the same command goes on where it was"
                fail(MachineError("memory", "as much as the plan says", "the system gave no more", do), as_json)
            what = f"internal error: {type(error).__name__}: {error}"
            _say([Problem(what, do="run it again with --debug and report what it prints")], "internal", as_json)
            sys.exit(INTERNAL)

    return wrapper


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
