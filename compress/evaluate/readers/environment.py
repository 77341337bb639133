"""Environment: a virtual environment for a reader, built once and cached.

It is built under another name and renamed once every package has its pinned version, so an environment that is there is
complete. A lock, which pip holds too, prevents two builds at a time, even if the first builder was killed. Nothing is written
outside the cache, and nothing of the user's own environment is visible inside.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from compress.checkpoint.cache import folder_of
from compress.errors import MachineError

Tell = Callable[[str], None]

STAMP = "environment.json"
_LAST_LINES = 8
# Variables that change what pip installs, or make Python import from outside the environment.
_LEAKS = (
    "VIRTUAL_ENV", "CONDA_PREFIX", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_SRC", "PIP_LOG", "PIP_PYTHON",
    "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_REQUIREMENT", "PIP_NO_DEPS", "PIP_DRY_RUN", "PIP_REPORT", "PIP_UPGRADE",
    "PIP_REQUIRE_VIRTUALENV", "PIP_IGNORE_INSTALLED", "PIP_QUIET", "PIP_NO_BINARY", "PIP_ONLY_BINARY", "PIP_PRE",
    "PIP_CACHE_DIR", "PIP_NO_CACHE_DIR", "PIP_NO_BUILD_ISOLATION", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip
_ELSEWHERE = ("target", "prefix", "root")
_VERSIONS = (
    "import json; from importlib import metadata; "
    "print(json.dumps({d.metadata['Name']: d.version for d in metadata.distributions()}))"
)
_MORE_ROOM = "free some space there, or set COMPRESS_CACHE to another disk"
_REMEDIES = (
    (("No space left on device", "Errno 28", "Disk quota exceeded"), _MORE_ROOM),
    (
        (
            "NewConnectionError", "Connection refused", "Network is unreachable", "name resolution", "Max retries", "ProxyError",
            "Could not fetch URL", "Read timed out", "ConnectTimeout", "CERTIFICATE_VERIFY_FAILED", "Name or service not known",
        ),
        "the package index cannot be reached: check the network and pip's own configuration, then run it again",
    ),
    (
        ("No matching distribution", "Could not find a version"),
        "pip's index does not have it for this Python: check the network and pip's own configuration, or use Python 3.11",
    ),
    (("ensurepip is not",), "install the venv module of this Python (Debian and Ubuntu: python3-venv)"),
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """The packages of a virtual environment, with exact versions."""

    name: str
    requirements: tuple[tuple[str, ...], ...]
    """Calls of `pip install`, in order; torch comes first, so that nothing else pulls in another build of it."""
    python: str = sys.executable
    """The interpreter that it is made with."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables for the builds of its packages."""
    needs_bytes: int = 0
    """Free disk space that the build needs."""

    def pins(self) -> dict[str, str]:
        """Version by package, of those that are pinned."""
        found = [word.split("==") for call in self.requirements for word in call if "==" in word and not word.startswith("-")]
        return {_plain(name): version for name, version in found}

    def key(self) -> str:
        """`<name>-<hash>`: other pins or another Python are another environment."""
        version = platform.python_version() if self.python == sys.executable else _asked(self.python)
        what = [self.name, self.requirements, self.variables, version, sys.platform, platform.machine()]
        return f"{self.name}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"


def torch_pin() -> str:
    """The version of torch here, without the suffix of its build: pip's configuration decides which build is installed."""
    return "torch==" + metadata.version("torch").partition("+")[0]


def cache_folder() -> Path:
    """Where environments are kept."""
    return folder_of("readers")


def interpreter(place: Path) -> Path:
    """The Python of an environment."""
    return place / "bin" / "python"


def ensure(environment: Environment, tell: Tell) -> Path:
    """The interpreter of the environment, which is built if it does not exist. `tell` gets every line that pip prints.

    Raises MachineError with pip's last lines and the path of its log.
    """
    cache = cache_folder()
    place = cache / environment.key()
    try:
        if _whole(place):
            return interpreter(place)
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{place.name}.lock", tell) as lock:
            if _whole(place):
                return interpreter(place)
            _build(environment, place, lock, tell)
    except OSError as error:
        do = _remedy(str(error)) or "set COMPRESS_CACHE to a folder that can be written"
        raise MachineError(str(cache), f"room for the environment of {environment.name}", str(error), do) from None
    return interpreter(place)


def packages(python: Path) -> dict[str, str]:
    """Every package of the environment whose interpreter this is."""
    stamp: dict[str, Any] = json.loads((python.parents[1] / STAMP).read_text())
    return dict(stamp["packages"])


def clean_variables(**more: str) -> dict[str, str]:
    """This process's environment variables, without those that affect which packages Python and pip see."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k not in _LEAKS}
    return {**kept, "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **more}


def _whole(place: Path) -> bool:
    """Whether it is complete, and the Python that it was made with still exists."""
    return (place / STAMP).is_file() and interpreter(place).exists()


def _build(environment: Environment, place: Path, lock: int, tell: Tell) -> None:
    where = f"the environment of {environment.name}"
    building, log = place.with_name(f"{place.name}.tmp"), place.with_name(f"{place.name}.log")
    for old in (building, place):
        shutil.rmtree(old, ignore_errors=True)
    free = shutil.disk_usage(place.parent).free
    if free < environment.needs_bytes:
        raise MachineError(str(place.parent), f"{environment.needs_bytes:,} free bytes for {where}", f"{free:,}", _MORE_ROOM)
    tell(f"building {where} in {place}; this is done once")
    # pip unpacks into a folder of the build, so that a killed build leaves nothing elsewhere. No cache: wheels that are built
    # here with other settings must not be found there by the user's own pip.
    variables = clean_variables(
        TMPDIR=str(building / "tmp"), PIP_USER="0", PIP_NO_CACHE_DIR="1", PIP_NO_INPUT="1", PIP_PROGRESS_BAR="off",
        PIP_DISABLE_PIP_VERSION_CHECK="1", **dict(environment.variables),
    )  # fmt: skip
    try:
        with open(log, "w", encoding="utf-8") as record:
            run = _Runner(where, building, variables, record, log, lock, tell)
            (building / "tmp").mkdir(parents=True)
            run([environment.python, "-m", "venv", str(building)], "a virtual environment")
            pip = [str(interpreter(building)), "-m", "pip"]
            _stays_here(run([*pip, "config", "list"], "pip's configuration", silent=True), where)
            for call in environment.requirements:
                run([*pip, "install", *call], f"pip install {' '.join(w for w in call)}")
            found = json.loads(run([pip[0], "-c", _VERSIONS], "the list of its packages", silent=True)[-1])
        _as_pinned(environment, found, where, log)
        shutil.rmtree(building / "tmp")
        facts = {"name": environment.name, "requirements": environment.requirements, "packages": found}
        (building / STAMP).write_text(json.dumps(facts, indent=1))
        os.rename(building, place)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    tell(f"built {where}")


@dataclass(frozen=True)
class _Runner:
    """Runs the commands of one build; their output goes into the log, and line by line to `tell`."""

    where: str
    folder: Path
    variables: dict[str, str]
    record: IO[str]
    log: Path
    lock: int
    tell: Tell

    def __call__(self, command: list[str], expected: str, silent: bool = False) -> list[str]:
        lines: list[str] = []
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", pass_fds=(self.lock,),
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if not silent:
                    self.record.write(line)
                    self.record.flush()
                    self.tell(lines[-1])
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status:
            last = [line for line in lines if line.strip() and not line.startswith("[notice]")][-_LAST_LINES:]
            got = "\n            ".join([f"exit status {status}", *last, f"all of it: {self.log}"])
            do = _remedy("\n".join(lines)) or "see the log; what was begun is removed, and the next run begins anew"
            raise MachineError(self.where, expected, got, do)
        return lines


def _stays_here(lines: list[str], where: str) -> None:
    """Raises MachineError for a `target` in pip's configuration, which pip obeys even inside a virtual environment."""
    for line in lines:
        option = line.partition("=")[0].rpartition(".")[2]
        if option in _ELSEWHERE:
            do = f"run it with a PIP_CONFIG_FILE that does not set {option}"
            raise MachineError(
                where, "a pip that installs into the environment it belongs to", f"{line} in its configuration", do
            )


def _as_pinned(environment: Environment, found: dict[str, str], where: str, log: Path) -> None:
    """Raises MachineError for a version that is not the pinned one: a later call of pip may replace an earlier one's."""
    held = {_plain(name): version.partition("+")[0] for name, version in found.items()}
    wrong = [f"{name} {held.get(name, 'missing')}, not {v}" for name, v in environment.pins().items() if held.get(name) != v]
    if wrong:
        raise MachineError(where, "what is pinned", "; ".join(wrong), f"see {log}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _remedy(text: str) -> str:
    return next((do for signs, do in _REMEDIES if any(sign in text for sign in signs)), "")


def _asked(python: str) -> str:
    """The version of another interpreter. Raises MachineError if it does not run."""
    try:
        command = [python, "-c", "import platform; print(platform.python_version())"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=clean_variables()).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise MachineError(python, "a Python that runs", str(error)) from None


@contextmanager
def _lock(path: Path, tell: Tell) -> Iterator[int]:
    """Waits for another build of the same environment. pip inherits the descriptor, because it may outlive us."""
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another process is building the same environment; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()
