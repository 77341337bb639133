"""Observe: what an allocator needs to know of weights' inputs, in one forward.

A sweep that changes nothing: every block runs as it is, and the next one gets its outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from compress.architecture.experts import experts_of
from compress.context import Context
from compress.contract.allocator import InputAllocator, Observed
from compress.executors.solved import Part
from compress.executors.sweep import Sweep
from compress.freed_memory import trim_memory
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.batches import Batch
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.stepwise import ForwardHooks
from compress.spec.weight_state import Weight

if TYPE_CHECKING:
    from compress.contract.step_plan import StepPlan


def observed(
    step: StepPlan, allocator: InputAllocator, weights: list[Weight], meta_model: MetaModel, batches: list[Batch], folder: Path,
    ctx: Context,
) -> dict[str, float]:  # fmt: skip
    """The allocator's number for the block of each weight; `folder` holds hidden states meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), ForwardHooks(meta_model) as hooks:
        sweep = Observation(step, allocator, folder, meta_model, hooks, batches, ctx)
        sweep.all_blocks(weights)
    trim_memory()
    return sweep.costs


class Observation(Sweep):
    """Observes the inputs of every block's weights, and asks the allocator about the block."""

    phase: ClassVar[str] = "observe"

    def __init__(
        self, step: StepPlan, allocator: InputAllocator, folder: Path, meta_model: MetaModel, hooks: ForwardHooks,
        batches: list[Batch], ctx: Context,
    ) -> None:  # fmt: skip
        self.step, self.pass_, self.folder, self.ctx = step, allocator, folder, ctx
        self.meta_model, self.hooks, self.batches, self.dense_parent = meta_model, hooks, batches, None
        self.seconds = defaultdict(float)
        self.allocator = allocator
        self.costs: dict[str, float] = {}

    def block(self, path: str, weights: list[Weight], probe: BatchWalk) -> int:
        found: list[tuple[Part, Any]] = []
        for key, members in self.spaces(path, weights, probe):
            if members and not key[1]:
                inputs = self.prepare(members[0], self.observe(key, members[0]))
                found += [((weight, None), inputs) for weight in members]
            elif members:
                parts = experts_of(members)
                for statistics in self.observe_experts(key, sorted({e for _, e in parts}), members[0].in_features):
                    # Experts that no token was sent to have no say.
                    ready = {e: self.prepare(members[0], one) for e, one in statistics.items() if one.tokens}
                    found += [(part, ready[part[1]]) for part in parts if part[1] in ready]

        def matrices() -> Iterator[Observed]:
            for (weight, expert), inputs in found:
                yield Observed(self.matrix(weight, expert), inputs)

        cost = self.allocator.cost(matrices)
        self.costs |= dict.fromkeys((weight.name for weight in weights), cost)
        return 0
