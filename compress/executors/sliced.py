"""Sliced: checks and writes the parts of a smaller model.

Every executor that makes one uses it: by scores, by a fit, by training.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from compress.checkpoint.atomic import write_text
from compress.contract.step_plan import Cut
from compress.executors.step_run import KEPT_FILE, StepRun
from compress.spec.kept import Kept
from compress.spec.weight_state import Weight


def check(kept: Kept, what: Cut) -> None:
    """Raises AssertionError unless as much is kept as was planned."""
    sizes = what.after
    assert len(kept.layers) == len(kept.blocks) == sizes.layers, kept.layers
    assert len(set(kept.hidden)) == sizes.hidden, len(kept.hidden)
    for block in kept.blocks:
        assert len(set(block.groups)) == sizes.groups, block.groups
        assert len(set(block.queries)) == sizes.queries, block.queries
        assert len(set(block.experts)) == sizes.experts, block.experts


def keep(run: StepRun, kept: Kept) -> None:
    """Keeps the decision in the step's directory."""
    write_text(run.writer.path / KEPT_FILE, json.dumps(kept.to_json()) + "\n")


def put(run: StepRun, weight: Weight, value: torch.Tensor, facts: dict[str, Any] | None = None) -> None:
    """Writes and journals one tensor."""
    assert tuple(value.shape) == weight.shape, (weight.name, value.shape, weight.shape)
    run.writer.record(weight.name, {weight.name: run.writer.put(weight.name, value)}, facts or {})
