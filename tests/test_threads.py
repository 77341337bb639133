"""Threads: what a run computes on, as a fresh process sees it; and what is put back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from compress.threads import available, compute_threads, workers
from forked import Server

SPY = """
import json, sys
wanted, seen = set(sys.argv[1].split(",")), {}
def look(frame, event, arg):
    name = frame.f_code.co_qualname
    if event == "call" and name in wanted and name not in seen:
        import torch
        seen[name] = torch.get_num_threads()
        if len(seen) == len(wanted):
            sys.setprofile(None)  # it costs
sys.argv = ["compress", *sys.argv[2:]]
from compress.__main__ import main
sys.setprofile(look)
try:
    main()
finally:
    sys.setprofile(None)
    print(json.dumps(seen))
"""
"""Runs a command line, and says how many threads torch has when each of some functions is first called. It asks nothing
of torch before, for a question would settle the number."""


Seen = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def seen_in() -> Iterator[Seen]:
    """Threads by function, of a command line; what forks has been told nothing of threads, and has computed nothing."""
    server = Server({name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"})

    def seen(functions: str, *arguments: str | Path) -> dict[str, int]:
        found = server.python(SPY, functions, *arguments)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout.splitlines()[-1])

    yield seen
    server.process.communicate()


@pytest.fixture(scope="module")
def text(demo_model: Path) -> Path:
    return demo_model.parent / "text" / "evaluation.jsonl"


def test_sweep_gradient_sweep_and_training_compute_on_what_was_said(
    seen_in: Seen, demo_model: Path, text: Path, tmp_path: Path
) -> None:
    recipe = (
        f"calibrate(data={text}, samples=4, length=32) | quantize.llm_mq(bits=3, schemes=[w2a16g32, w4a16g32])"
        " | distill.logits(batch=4)"
    )
    parts = "Sweep.block,GradientSweep.run,Training._one_step"
    found = seen_in(parts, "run", demo_model, tmp_path / "out", "-p", recipe, "--threads", "3", "-q")
    assert found == {"GradientSweep.run": 3, "Sweep.block": 3, "Training._one_step": 3}


def test_eval_and_bench_compute_on_what_was_said(seen_in: Seen, demo_model: Path, text: Path, tmp_path: Path) -> None:
    seen_in("", "run", demo_model, tmp_path / "out", "-p", "quantize.rtn(scheme=w4a16g32) | pack(format=native)", "-q")
    measured = seen_in("_rows", "eval", tmp_path / "out", "--data", text, "--tokens", "512", "--threads", "3")
    timed = seen_in("Decoder.prompt", "bench", tmp_path / "out", "--prompt", "8", "--new", "2", "--batch", "1", "--threads", "3")
    assert (measured, timed) == ({"_rows": 3}, {"Decoder.prompt": 3})


def test_a_run_that_is_told_nothing_computes_on_every_core(seen_in: Seen, demo_model: Path, text: Path, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        pytest.skip("one core, which is also what a run had that took a worker's number")
    recipe = f"calibrate(data={text}, samples=4, length=32) | prune.wanda(sparsity=0.5)"
    found = seen_in("Sweep.block", "run", demo_model, tmp_path / "out", "-p", recipe, "-q")
    assert found == {"Sweep.block": cores}


def test_workers_have_one_thread_each_and_leave_the_others_theirs() -> None:
    with compute_threads(3):
        with workers(2) as pool:
            assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
        assert torch.get_num_threads() == 3


def test_workers_may_have_several_threads() -> None:
    with compute_threads(6), workers(3, 2) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {2}
        assert torch.get_num_threads() == 6


def test_the_number_from_before_comes_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), compute_threads(before + 1), workers(2) as pool:
        list(pool.map({}.__getitem__, [1]))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "nonsense"}, 8),
        ({"LOCAL_WORLD_SIZE": "2"}, 4),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        # torchrun's own 1 is nobody's wish, another number is.
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 4),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 2),
        ({"OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_what_a_process_may_use(variables: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert available(tmp_path) == cores


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("broken", 8)])
def test_a_container_s_limit_of_processor_time_counts(
    limit: str, cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(limit)
    assert available(tmp_path) == cores
