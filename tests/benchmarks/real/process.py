"""Process: runs a command in a fresh process and measures it: seconds, CPU seconds, peak memory, and how busy the machine was.

Between us and the command stands a process that has imported next to nothing: Linux counts the memory of whoever starts a
program into that program's peak, and ours holds torch.

    python -I process.py ANSWER.json LOG COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.1
"""Seconds of a process count as measured on a busy machine where others took more than this share of its cores."""


@dataclass(frozen=True)
class Usage:
    """What a command took, its own children among it."""

    status: int
    """Exit status; negative where a signal ended it."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    others: float | None
    """Share of the machine's cores that other processes had meanwhile; None where /proc/stat is not there."""

    @property
    def cpu_share(self) -> float:
        """CPU seconds a second: 2.0 is two cores all the time."""
        return self.cpu_seconds / max(self.seconds, 1e-9)

    @property
    def busy(self) -> bool:
        return self.others is not None and self.others > BUSY

    def facts(self) -> dict[str, object]:
        """As JSON."""
        return {
            "status": self.status, "seconds": round(self.seconds, 2), "cpu_seconds": round(self.cpu_seconds, 2),
            "cpu_share": round(self.cpu_share, 3), "peak_bytes": self.peak_bytes,
            "others": None if self.others is None else round(self.others, 3), "busy": self.busy,
        }  # fmt: skip


def measure(command: list[str], log: Path, variables: dict[str, str] | None = None, folder: Path | None = None) -> Usage:
    """Runs it to its end; what it prints on stderr goes to `log`, and on stdout to the same name with `.out`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    answer = log.with_suffix(".usage")
    answer.unlink(missing_ok=True)
    shim = [sys.executable, "-I", "-S", __file__, str(answer), str(log), *command]
    done = subprocess.run(shim, env=variables, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if not answer.is_file():
        raise OSError(f"{command[0]}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return Usage(**json.loads(answer.read_text()))


def busy_seconds() -> float | None:
    """CPU seconds that all processes of this machine have had since it started."""
    try:
        with open("/proc/stat", encoding="ascii") as stream:
            user, nice, system, _, _, irq, soft, *_ = (int(word) for word in stream.readline().split()[1:])
    except OSError:
        return None
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def main(answer: str, log: str, *command: str) -> None:
    """Inside the process that measures."""
    with open(log, "wb") as err, open(os.path.splitext(log)[0] + ".out", "wb") as out:
        before, started = busy_seconds(), time.perf_counter()
        files = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, err.fileno(), 2)]
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=files)
        _, status, used = os.wait4(pid, 0)
        seconds, after = time.perf_counter() - started, busy_seconds()
    cpu = used.ru_utime + used.ru_stime
    others = None
    if before is not None and after is not None:
        others = max(0.0, after - before - cpu) / (seconds * (os.cpu_count() or 1))
    with open(answer, "w", encoding="ascii") as stream:
        json.dump(
            {
                "status": os.waitstatus_to_exitcode(status), "seconds": seconds, "cpu_seconds": cpu,
                "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024), "others": others,
            },
            stream,
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
