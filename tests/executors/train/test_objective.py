"""What an objective may have besides a loss: parts, parameters and buffers of its own, a penalty, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.contract.discover import load_pass
from compress.contract.objective import Loss, Metric, Models, Objective, OwnParameters
from compress.contract.tasks import TrainingBatch
from compress.errors import InputError
from support import do, ready_inputs, rows

RECIPE = f"prune.magnitude(sparsity=2:4) | distill.logits(data='{ready_inputs()}', samples=6, epochs=2, lr=1e-3, save_every=2"
"""With more options and a bracket: six steps of two samples."""


class Shifted(Objective):
    """Cross entropy after a learned shift of all logits, whose mean square a multiplier holds at a target."""

    target = 1e-3

    def __init__(self, models: Models) -> None:
        drawn = torch.randn(128, generator=torch.Generator().manual_seed(models.seed))
        self.shift, self.multiplier = nn.Parameter(0.1 * drawn), nn.Parameter(torch.zeros(()))
        self.seen, self.steps, self.forwards, self.closed = torch.zeros(1), [0, 0], 0, False
        self.hook = models.student.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def loss(self, batch: TrainingBatch, student: Any, teacher: Any) -> Loss:
        logits = student(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.positions] + self.shift
        each = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        halves = torch.stack([each.sum() / 2, each.sum() / 2])
        return Loss(each.sum() * self.seen[0], {"ce": each.sum(), "halves": halves})

    def own(self) -> list[OwnParameters]:
        return [
            OwnParameters({"shift": self.shift}, 1e-2),
            OwnParameters({"multiplier": self.multiplier}, 0.5, lambda step, steps: 1.0, maximize=True),
        ]

    def buffers(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def prepare(self, batches: Iterable[TrainingBatch], add_up: Callable[[torch.Tensor], None]) -> None:
        tokens = torch.tensor(float(sum(len(batch.labels) for batch in batches)))
        add_up(tokens)
        self.seen += tokens / tokens

    def begin_step(self, step: int, steps: int) -> None:
        self.steps = [step, steps]

    def penalty(self) -> torch.Tensor:
        return self.multiplier * (self.shift.square().mean() - self.target)

    def metrics(self) -> dict[str, Metric]:
        return {"step_of_steps": [float(number) for number in self.steps], "multiplier": float(self.multiplier.detach())}

    def close(self) -> None:
        self.hook.remove()
        self.closed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Shifted]:
    """The objectives that runs have made, in place of the one of distill.logits."""
    found: list[Shifted] = []

    def objective(pass_: Any, models: Models) -> Objective:
        found.append(Shifted(models))
        return found[-1]

    monkeypatch.setattr(load_pass("distill.logits"), "objective", objective)
    return found


def test_parts_and_metrics_are_recorded_and_told(made: list[Shifted], tiny: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    do(tiny, tmp_path / "out", f"{RECIPE}, batch=2)", events=events.append)
    found = rows(tmp_path / "out")
    assert len(found) == 6
    told = [event["metrics"] for event in events if event["event"] == "train"]
    for number, (row, metrics) in enumerate(zip(found, told, strict=True)):
        assert row["ce"] == row["loss"] == pytest.approx(sum(row["halves"]))  # type: ignore[arg-type]
        assert row["step_of_steps"] == [number, 6]
        assert metrics == {name: row[name] for name in ("ce", "halves", "step_of_steps", "multiplier", "penalty")}
    (one,) = made
    assert one.closed
    assert one.forwards >= 6
    assert not one.hook.hooks_dict_ref() or one.hook.id not in one.hook.hooks_dict_ref()


@pytest.mark.parametrize("target", [1e-3, 1.0])
def test_what_is_maximized_ascends(target: float, made: list[Shifted], tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A multiplier grows while its constraint is above the target, and falls below it; AdamW's first step is its rate."""
    monkeypatch.setattr(Shifted, "target", target)
    do(tiny, tmp_path / "out", f"{RECIPE}, batch=2)")
    found = [row["multiplier"] for row in rows(tmp_path / "out")]
    sign = 1 if target < 0.01 else -1
    assert sign * found[0] == pytest.approx(0.5, rel=1e-3)
    assert [sign * value for value in found] == sorted(sign * value for value in found)


def test_nothing_of_its_own_is_written(made: list[Shifted], tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    do(tiny, tmp_path / "out", f"{RECIPE}, batch=2)")
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("after", [1, 3, 4])
def test_what_it_has_learned_is_resumed(after: int, made: list[Shifted], tiny: Path, tmp_path: Path) -> None:
    """Parameters, moments and buffers; what was measured before the first step is not measured again after a state."""
    do(tiny, tmp_path / "whole", f"{RECIPE}, batch=2)")

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["number"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(tiny, tmp_path / "out", f"{RECIPE}, batch=2)", events=stop)
    assert made[-1].closed
    do(tiny, tmp_path / "out", f"{RECIPE}, batch=2)")
    for name in ("model.safetensors", "training.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    first, last = made[0], made[-1]
    assert torch.equal(first.shift, last.shift)
    assert torch.equal(first.multiplier, last.multiplier)
    assert torch.equal(first.seen, last.seen)
    assert float(last.seen) == 1


def test_how_a_step_is_divided_changes_nothing_but_rounding(made: list[Shifted], tiny: Path, tmp_path: Path) -> None:
    for size in (1, 4):
        do(tiny, tmp_path / f"{size}", f"{RECIPE}, batch=4, micro_batch={size})")
    one, other = made
    torch.testing.assert_close(one.shift, other.shift, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.multiplier, other.multiplier, rtol=1e-4, atol=1e-6)
    losses = [[row["ce"] for row in rows(tmp_path / f"{size}")] for size in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_gradient_of_its_own_that_is_no_number_stops_the_run(
    made: list[Shifted], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shifted, "target", float("nan"))
    with pytest.raises(InputError, match="a gradient of norm nan"):
        do(tiny, tmp_path / "out", f"{RECIPE}, batch=2)")
    assert made[-1].closed
