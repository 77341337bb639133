"""SIGTERM and Ctrl-C end a run with the command that goes on; two runs at once and a clock that jumps change nothing."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ENVIRONMENT, RECIPES, Server, same

from compress.pipeline.output_paths import steps_folder
from support import few, shared, tiny_llama

RECIPE = RECIPES["sweep"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("signals") / "model", num_hidden_layers=8)


@pytest.fixture(scope="module")
def reference(model: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signals") / "reference"
    assert server.run(["run", model, out, "-p", RECIPE, "--quiet"]).status == 0
    return out


@pytest.mark.parametrize(
    ("phase", "number"), shared(["read", "quantize.gptq: work", "pack: work"], [signal.SIGINT, signal.SIGTERM])
)
def test_a_signal_is_answered_with_the_command_that_goes_on(
    number: signal.Signals, phase: str, model: Path, reference: Path, server: Server, tmp_path: Path
) -> None:
    command = ["run", model, tmp_path / "out", "-p", RECIPE, "--json"]
    ran = server.run(command, phase, number=number)
    assert ran.status == 128 + number
    assert ran.words == []
    (last,) = ran.told("stopped")
    assert last["signal"] == number.name
    assert not (tmp_path / "out").exists()
    assert server.run(shlex.split(last["resume"])[1:]).status == 0
    assert same(tmp_path / "out", reference) == []


@pytest.mark.parametrize("after", few([0.0, 0.3, 1.0, None], 0.3, None))
def test_ctrl_c_of_a_real_process(after: float | None, model: Path, tmp_path: Path) -> None:
    """At any moment, imports included, words and no traceback; in the middle of the work, with the command."""
    command = [sys.executable, "-m", "compress", "run", model, tmp_path / "a b", "-p", RECIPE]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if after is None:
        wait(lambda: bool(list(steps_folder(tmp_path / "a b").glob("*gptq*.tmp"))))
    else:
        # What comes before the interpreter has got as far as our first line is not ours.
        wait(lambda: b"compress" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        time.sleep(0.2 + after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "stopped by SIGINT" in said
    if after is None:
        assert f"\n  compress run {model} '{tmp_path / 'a b'}' -p" in said


COMMAND = """
import os, signal, sys, time
from compress import __main__
from compress.cli import app
def interrupted(arguments):
    {body}
app.build = interrupted
sys.argv = ["compress", "--value", "x"]
__main__.main()
"""


@pytest.mark.parametrize(
    "body",
    [
        # typer itself would end with the status alone.
        """import typer
    made = typer.Typer()
    @made.callback(invoke_without_command=True)
    def nothing(value: str = typer.Option("", parser=lambda text: exec("raise KeyboardInterrupt"))): ...
    return made""",
        # Python drops what a destructor raises.
        """class Interrupted:
        def __del__(self): os.kill(os.getpid(), signal.SIGINT)
    Interrupted()
    time.sleep(60)""",
        # A library that catches everything.
        """try: os.kill(os.getpid(), signal.SIGINT)
    except BaseException: pass
    time.sleep(60)""",
    ],
    ids=["arguments", "destructor", "caught"],
)
def test_ctrl_c_outside_a_command_has_words(body: str) -> None:
    command = [sys.executable, "-P", "-c", COMMAND.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT\n")


def wait(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def test_two_runs_at_once(model: Path, reference: Path, server: Server, tmp_path: Path) -> None:
    """The second one is told; the first one goes on. Another OUT is nobody's business."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "compress", "run", str(model), str(out), "-p", RECIPE, "--quiet"]
    first = subprocess.Popen(command, env=ENVIRONMENT)
    wait((steps_folder(out) / "lock").exists)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = server.run(["run", model, out, "-p", RECIPE])
        assert second.status == 6
        assert any("a run that holds its lock" in line for line in second.words)
        assert server.run(["clean", out]).status == 6
        assert server.run(["run", model, tmp_path / "other", "-p", RECIPE, "--quiet"]).status == 0
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.wait(timeout=60) == 0
    assert same(out, reference) == same(tmp_path / "other", reference) == []


JUMP = """
import time
real = time.time
started = real()
time.time = lambda: real() + {seconds} * (1 if real() - started > 0.2 else -1)
time.gmtime = lambda *given, made=time.gmtime: made(*(given or (max(0, time.time()),)))
"""


@pytest.mark.parametrize("seconds", [-3600, *(pytest.param(ahead, marks=pytest.mark.slow) for ahead in (3600, 40 * 365 * 86400))])
def test_a_clock_that_jumps_changes_no_byte(seconds: int, model: Path, reference: Path, server: Server, tmp_path: Path) -> None:
    """In the middle of a run, and between a kill and what goes on; files from the future are no other files either."""
    command = ["run", model, tmp_path / "out", "-p", RECIPE, "--json"]
    assert server.run(command, "quantize.gptq: work", 0.5, 0.2, before=JUMP.format(seconds=seconds)).status == -9
    for path in [*steps_folder(tmp_path / "out").rglob("*"), *model.iterdir()]:
        os.utime(path, (4e9, 4e9) if seconds > 0 else (1, 1))
    ran = server.run(command, before=JUMP.format(seconds=-seconds))
    assert ran.status == 0, ran.events[-1]
    assert sum(event.get("kept", 0) for event in ran.told("progress")) > 0
    assert same(tmp_path / "out", reference) == []


def test_whoever_reads_our_output_may_go(model: Path, tmp_path: Path) -> None:
    """A reader that closes its end stops a run with the status of SIGPIPE, quietly."""
    command = [sys.executable, "-m", "compress", "run", model, tmp_path / "out", "-p", RECIPE, "--json"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert (process.wait(timeout=60), said) == (128 + signal.SIGPIPE, b"")
