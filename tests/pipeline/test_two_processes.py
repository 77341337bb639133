"""Two processes on one OUT: one works, in the middle of a pass of each executor; the other is told, and whoever comes later goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import get_args

import pytest

from compress.contract.discover import load_pass
from compress.contract.pass_base import Executor
from compress.pipeline import output_paths
from compress.spec.recipe import parse_one_liner
from forked import ENVIRONMENT, Server, compress, python
from support import few, ready_inputs, tree

HELD = """
import sys, time
from pathlib import Path
from compress.checkpoint.writer import Writer
reached, go, *arguments = sys.argv[1:]
real = Writer.{method}
def held(self, *given):
    found = real(self, *given)
    if "{step}" in self.path.name:
        Path(reached).touch()
        while not Path(go).exists():
            time.sleep(0.01)
    return found
Writer.{method} = held
sys.argv = ["compress", *arguments]
from compress.__main__ import main
main()
"""
"""A command that waits in the middle of a step, once a method of its writer was called."""
TOKENS = ready_inputs(8, 24)
CALIBRATE = f"calibrate(data='{TOKENS}', samples=8)"
TEACH = "epochs=1, batch=2, micro_batch=2"
PASSES = {
    "tokens": ("calibrate", f"{CALIBRATE} | quantize.gptq(scheme=w4a16g32)"),
    "stream": ("quantize.rtn", "quantize.rtn(scheme=w4a16g32) | pack"),
    "sweep": ("quantize.gptq", f"{CALIBRATE} | quantize.gptq(scheme=w4a16g32) | pack"),
    "smooth": ("quantize.smooth", f"{CALIBRATE} | quantize.smooth(scheme=w4a16g32) | quantize.rtn(scheme=w4a16g32)"),
    "train": ("distill.logits", f"{CALIBRATE} | distill.logits({TEACH}) | quantize.rtn(scheme=w4a16g32)"),
    "blocks": ("distill.blocks", f"{CALIBRATE} | prune.wanda(sparsity=2:4) | distill.blocks({TEACH})"),
    "cache": ("quantize.kv", f"{CALIBRATE} | quantize.kv"),
    "rotate": ("quantize.rotate", "quantize.rotate | quantize.rtn(scheme=w4a16g32) | pack"),
    "slice": ("prune.width", f"{CALIBRATE} | prune.width(ffn=64)"),
}
"""What runs a pass -> the step in which the first process waits, and the recipe."""


@pytest.fixture(scope="module")
def other() -> Iterator[Server]:
    """A second process that forks, beside the one that `compress` asks."""
    found = Server({**os.environ, **ENVIRONMENT})
    yield found
    found.process.kill()
    found.process.wait()


@pytest.mark.parametrize("kind", few(PASSES, "tokens", "sweep", "train", "slice"))
def test_a_second_process_is_told_and_a_third_goes_on(kind: str, tiny: Path, other: Server, tmp_path: Path) -> None:
    step, recipe = PASSES[kind]
    out, reached, go = tmp_path / "out", tmp_path / "reached", tmp_path / "go"
    command = ["run", tiny, out, "-p", recipe, "--threads", 1, "--quiet"]
    code = HELD.format(method="open" if kind == "tokens" else "record", step=f"-{step}-")
    ended: list[CompletedProcess[str]] = []
    first = threading.Thread(target=lambda: ended.append(other.python(code, reached, go, *command)))
    first.start()
    try:
        deadline = time.monotonic() + 600
        while not reached.exists():
            assert not ended, ended
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for refused in (compress(*command), compress("clean", out)):
            assert refused.returncode == 6
            assert "an output that no other run is writing" in refused.stderr
            assert "wait for it, or choose another OUT" in refused.stderr
        # Another OUT is nobody's business, and may take what the first has finished meanwhile.
        beside = compress("run", tiny, tmp_path / "beside", *command[3:], "--steps", out)
        assert beside.returncode == 0, beside.stderr
    finally:
        go.touch()
        first.join()
    assert ended[0].returncode == 0, ended[0].stderr
    assert tree(out) == tree(tmp_path / "beside")
    again = compress(*command[:-1])
    assert (again.returncode, again.stdout) == (0, f"up to date: {out}\n"), again.stderr
    assert not list(output_paths.steps_folder(out).glob("*.tmp"))


def test_every_executor_is_there() -> None:
    """The recipes above hold what they say, and no executor is missing."""
    for kind, (step, recipe) in PASSES.items():
        lines = {line.name: line for line in parse_one_liner(recipe).lines}
        assert load_pass(step).model_validate(dict(lines[step].options)).executor() == kind
    assert {*get_args(Executor)} == PASSES.keys()


def test_a_file_system_without_locks_is_said(tiny: Path, tmp_path: Path) -> None:
    """Lustre without `-o flock`, say: two runs there would not know of each other."""
    code = """
import errno, fcntl, os, sys
def none(descriptor, how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = none
sys.argv = ["compress", *sys.argv[1:]]
from compress.__main__ import main
main()
"""
    done = python(code, "run", tiny, tmp_path / "out", "-p", "quantize.rtn(scheme=w4a16g32)", "--quiet")
    assert done.returncode == 6
    assert "a file system with locks" in done.stderr
    assert "Function not implemented" in done.stderr
    assert not (tmp_path / "out").exists()


TORN = """
import os, sys
from compress.checkpoint.writer import Writer
real = Writer.detach
def detach(self):
    real(self)
    if self.rank and "-quantize" in self.path.name:
        with open(self.path / self.shards[0].file, "r+b") as stream:
            stream.seek(-300, os.SEEK_END)
            stream.write(bytes(200))
Writer.detach = detach
sys.argv = ["compress", *sys.argv[1:]]
from compress.__main__ import main
main()
"""
"""A process whose host writes back a page over what another one has written there."""


@pytest.mark.parametrize("kind", ["stream", "rotate", "sweep"])
def test_ranks_on_two_hosts_read_what_each_other_wrote(kind: str, tiny: Path, other: Server, tmp_path: Path) -> None:
    """Two ranks that torchrun has started on two hosts. What a file system between them lost is found before it is published."""
    recipe, hosts = PASSES[kind][1], {"LOCAL_WORLD_SIZE": "1"}
    command = ["run", tiny, tmp_path / "out", "-p", recipe, "--threads", 1, "--dtype", "float32", "--quiet"]
    torn = other.python(TORN, *command, ranks=2, **hosts)
    assert torn.returncode == 6, torn.stderr
    assert "the bytes that its process wrote" in torn.stderr
    assert not (tmp_path / "out").exists()
    again = other.compress(*command, ranks=2, **hosts)
    assert again.returncode == 0, again.stderr
    alone = compress("run", tiny, tmp_path / "alone", *command[3:])
    assert alone.returncode == 0, alone.stderr
    # Every tensor; errors that are summed over other batches may differ in their last digits.
    made, reference = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")} for name in ("out", "alone"))
    assert made == reference
