"""Progress: phases with totals of their own, as bars, as lines, and not at all."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compress.cli.app import build
from compress.cli.progress import Follower, Lines, Phase, clock, events, seconds, shares, ticking
from support import TEXT, ready_inputs


def moved(phase: Phase, at: float, done: int, kept: int = 0) -> Phase:
    phase.move({"event": "progress", "done": done, "total": 30, "unit": "blocks", "kept": kept}, at)
    return phase


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """What a verb prints, and where stderr is no terminal what it tells there."""
    line = [*map(str, words)]
    build(line)(line, standalone_mode=False)
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.parametrize(("spent", "said"), [(0.4, "0:00"), (48, "0:48"), (72.4, "1:12"), (3723, "1:02:03")])
def test_clock(spent: float, said: str) -> None:
    assert clock(spent) == said
    assert seconds(spent) == (f"{spent:.1f} s" if spent < 60 else said)


def test_what_is_left_is_told_from_the_pace_of_late() -> None:
    phase = moved(Phase("a: solve", 0.0), 4.0, 1)
    assert phase.left(4.0) == pytest.approx(29 * 4)
    for block in range(2, 13):
        moved(phase, 4.0 * block, block)
    assert phase.line(48.0) == "a: solve 12/30 blocks, 0:48, about 1:12 left"
    assert phase.left(50.0) == pytest.approx(70)
    # A block that is late is the pace from now on, and never makes a promise of nothing.
    assert phase.left(60.0) > 60
    # What an earlier run had solved goes by at once, and says nothing of the rest.
    resumed = Phase("a: solve", 0.0)
    for block in range(1, 17):
        moved(resumed, block / 100, block, kept=7)
    for block in range(17, 20):
        moved(resumed, 4.0 * (block - 16), block, kept=0)
    assert resumed.left(12.0) == pytest.approx(11 * 4, rel=0.03)


def test_a_phase_says_what_is_done_in_its_own_unit() -> None:
    moving = Phase("pack: write", 0.0)
    moving.move({"event": "progress", "done_bytes": 153_900_000, "total_bytes": 269_000_000}, 2.0)
    assert moving.said == "153.90/269.00 MB"
    moving.move({"event": "progress", "done_bytes": 269_000_000, "total_bytes": 269_000_000}, 3.0)
    assert moving.line(9.0) == "pack: write 269.00 MB in 3.0 s"
    training = Phase("distill.logits: train", 0.0)
    training.move({"event": "train", "number": 3, "steps": 12, "loss": 1.25, "tokens_per_second": 900}, 3.0)
    assert training.line(3.0) == "distill.logits: train 3/12 steps, 0:03, about 0:09 left, loss 1.2500"


def test_a_long_phase_has_a_line_every_while(capsys: pytest.CaptureFixture[str]) -> None:
    with ticking(Follower(Lines(every=0.05)), 0.05) as follower:
        follower.receive({"event": "plan", "steps": ["calibrate", "quantize.gptq", "quantize.gptq"]})
        follower.receive({"event": "begin", "step": "quantize.gptq"})
        follower.receive(
            {"event": "progress", "step": "quantize.gptq", "phase": "solve", "done": 0, "total": 2, "unit": "blocks"}
        )
        time.sleep(0.4)
        follower.receive({"event": "step", "name": "quantize.gptq", "seconds": 0.4})
        follower.receive({"event": "begin", "step": "quantize.gptq"})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "quantize.gptq: step 2 of 3"
    assert len([line for line in lines if re.fullmatch(r"quantize.gptq: solve 0/2 blocks, 0:00", line)]) >= 2
    assert lines[-2:] == ["quantize.gptq: done in 0.4 s", "quantize.gptq: step 3 of 3"]


def test_shares_are_told_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[dict[str, Any]] = []
    tell = shares(told.append, "eval", "measure")
    for share in (0.0, 0.001, 0.5, 0.501, 0.999, 1.0, 1.0):
        tell(share)
    assert [event["done"] for event in told] == [50, 99, 100]


def test_a_run_tells_its_steps_and_phases_where_stderr_is_no_terminal(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate = f"calibrate(data='{TEXT / 'calibration.jsonl'}', samples=2, length=32)"
    text = f"{calibrate} | quantize.llm_mq(bits=3, schemes=[w2a16g32, w4a16g32]) | pack(format=native)"
    out, err = typed(capsys, "run", demo_model, tmp_path / "out", "-p", text)
    assert "where:" in out
    # Lines of phases that last for more than a second come between.
    ends = [line for line in err.splitlines() if " left" not in line]
    steps = [line for line in ends if ": step " in line]
    assert steps == ["calibrate: step 1 of 3", "quantize.llm_mq: step 2 of 3", "pack: step 3 of 3"]
    for phase in (
        r"read [\d.]+ MB", r"quantize.llm_mq: gradients forward 4 blocks", r"quantize.llm_mq: gradients backward 4 blocks",
        r"quantize.llm_mq: copy [\d.]+ \wB", r"quantize.llm_mq: solve 4 blocks", r"pack: write [\d.]+ MB", r"pack: done",
    ):  # fmt: skip
        assert [line for line in ends if re.fullmatch(rf"{phase} in [\d.:]+( s)?", line)], (phase, err)


def test_quiet_is_silent_and_json_has_the_phases(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"calibrate(data={ready_inputs()}, samples=6) | prune.wanda(sparsity=0.5) | quantize.rtn(scheme=w4a16g32)"
    assert typed(capsys, "run", tiny, tmp_path / "quiet", "-p", text, "--quiet") == ("", "")
    out, err = typed(capsys, "run", tiny, tmp_path / "json", "-p", text, "--json")
    assert err == ""
    assert '"phase": "solve"' in out
    found = {
        (event["step"], event["phase"], event.get("total", event["total_bytes"]))
        for event in map(json.loads, out.splitlines())
        if event["event"] == "progress"
    }
    assert {(step, phase) for step, phase, _ in found} == {
        ("read", "read"), ("prune.wanda", "copy"), ("prune.wanda", "solve"), ("quantize.rtn", "write"),
    }  # fmt: skip
    # A phase has one total.
    assert len(found) == 4
    assert ("prune.wanda", "solve", 2) in found


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self) -> bool:
        return True


def test_bars_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    bar = {"event": "progress", "step": "quantize.llm_mq", "phase": "gradients backward", "unit": "blocks", "total": 30}
    lesson = {"event": "train", "step": "distill.logits", "phase": "train", "steps": 384, "loss": 1.5, "tokens_per_second": 9e4}
    with events(False, False) as receive:
        for done in (0, 20, 30):
            receive({**bar, "done": done})
            time.sleep(0.6)
        receive({"event": "begin", "step": "distill.logits"})
        receive({**lesson, "number": 20})
        time.sleep(0.6)
        receive({**lesson, "number": 40})
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = re.split(r"[\r\n]+", drawn)
    assert max(map(len, lines)) <= 80
    assert any(re.search(r"quantize.llm_mq: gradients backward .* 20/30 blocks, \d:\d\d left", line) for line in lines), drawn
    assert any(re.search(r"distill.logits: train .* 40/384 steps, .*loss 1.5000", line) for line in lines), drawn


def test_commands_that_measure_report_too(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = typed(capsys, "diff", tiny, tiny)
    assert re.search(r"^diff: compare 100% in ", err, re.MULTILINE)
    _, err = typed(capsys, "verify", tiny)
    assert re.search(r"^verify: decode 21 weights in ", err, re.MULTILINE)
    assert typed(capsys, "verify", tiny, "--json")[1] == ""
