"""Guard: every verb's way out; messages and exit statuses, no tracebacks."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from compress.errors import CompressError, Problem

INTERNAL = 70
INTERRUPTED = 130


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Wraps a verb; its keyword arguments `json_` and `debug`, where it has them, are obeyed here."""

    @functools.wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except CompressError as error:
            if kwargs.get("debug"):
                raise
            fail(error, bool(kwargs.get("json_")))
        except KeyboardInterrupt:
            print("stopped. Nothing is lost: the same command goes on where it was.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            sys.exit(0)
        except Exception as error:
            if kwargs.get("debug"):
                raise
            problem = Problem(
                f"internal error: {type(error).__name__}: {error}", do="run it again with --debug and report what it prints"
            )
            if kwargs.get("json_"):
                print(json.dumps({"event": "error", "kind": "internal", "problems": [problem.__dict__]}, ensure_ascii=False))
            else:
                print(problem, file=sys.stderr)
            sys.exit(INTERNAL)

    return wrapper


def fail(error: CompressError, as_json: bool) -> None:
    """Prints every problem of `error` and ends with its status."""
    if as_json:
        problems = [problem.__dict__ for problem in error.problems]
        print(json.dumps({"event": "error", "kind": type(error).__name__, "problems": problems}, ensure_ascii=False))
    else:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        if len(error.problems) > 1:
            print(f"{len(error.problems)} problems", file=sys.stderr)
    sys.exit(error.exit_status)
