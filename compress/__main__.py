"""The entry point: warns of shadowed packages, then hands over to the app."""

from __future__ import annotations

import atexit
import importlib.util
import os
import signal
import sys
from pathlib import Path


def shadowed() -> list[str]:
    """Top-level folders named compress or kernels that would be imported in place of the installed ones.

    `python -m` puts the working directory first on the path: a folder `kernels` there is taken by transformers for
    the package of that name. `python -P -m compress` or PYTHONSAFEPATH=1 avoids it.
    """
    if sys.flags.safe_path or not sys.path or sys.path[0] not in ("", str(Path.cwd())):
        return []
    here = Path(__file__).resolve().parent
    found = []
    for name in ("compress", "kernels"):
        spec = importlib.util.find_spec(name)
        where = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else None
        if where is not None and where.resolve().parent == Path.cwd().resolve() and where.resolve() != here:
            found.append(str(where))
    return found


def main() -> None:
    """The command that the arguments name; ends in SystemExit."""
    if sys.platform == "win32":
        sys.exit("compress runs on Linux and macOS: it relies on pread, flock and atomic renames. Use WSL on Windows.")
    from compress.cli.signals import STOPPED, answer, close_output, stopped

    # Until a command is found, which says how it can be resumed.
    answer()
    try:
        for folder in shadowed():
            print(f"warning: {folder} shadows a package of that name; run with PYTHONSAFEPATH=1", file=sys.stderr)
        # Large pages for large tensors: fewer page faults, and fewer gaps that stay in memory. torch reads it when it is loaded.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        # A thread of libgomp that waits spins for microseconds before it sleeps, not for a millisecond: beside other work,
        # spinning takes the cores from the threads that are waited for. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) halves a
        # sweep's speed.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        from compress.cli.app import build
        from compress.cli.complete import words

        build(sys.argv[1:] or words())()
    except KeyboardInterrupt as stop:
        # Interrupts while the command is looked up; a command that runs is guarded by its own wrapper.
        stopped(stop)
    except SystemExit as end:
        # typer ends without a word where an interrupt comes while it reads the arguments.
        if end.code == STOPPED + signal.SIGINT:
            stopped(KeyboardInterrupt())
        raise
    finally:
        close_output()


def run() -> None:
    """The entry point of both commands: `main`, and the end of the process with its status."""
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    if not isinstance(status, int):
        sys.exit(str(status))
    # What was registered for the end; and then at once, for Python would look several times through all that torch and
    # transformers have made before it ends: 1.5 of 5 seconds.
    from compress.cli.signals import close_output

    atexit._run_exitfuncs()
    close_output()
    os._exit(status)


if __name__ == "__main__":
    run()
