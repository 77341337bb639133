"""Extract: writes the smaller model that a training run has found.

The masks of what is kept are folded into its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import torch

from compress.architecture.axes import rescaled, slices
from compress.executors.sliced import check, put
from compress.executors.step_run import KEPT_FILE, StepRun
from compress.executors.train.mask_objective import MaskObjective


def extract(run: StepRun, objective: MaskObjective, trained: Callable[[str], torch.Tensor | None]) -> None:
    """Writes every tensor of the smaller model; `trained` is a weight's trained value, None for one that was not trained."""
    cut = run.step.cut
    assert cut is not None
    kept, masks = objective.settled()
    check(kept, cut)
    if run.ctx.is_main:
        (run.writer.path / KEPT_FILE).write_text(json.dumps(kept.to_json()) + "\n")
    weights = {weight.name: weight for weight in run.weights}
    tied = not any(weight.kind == "head" for weight in cut.weights)
    for part in slices(cut.weights, cut.family, kept.layers, [block.experts for block in kept.blocks]):
        value = trained(part.source.name)
        if not run.ctx.is_main or run.writer.is_done(part.name):
            continue
        stored = run.source.read(part.source.name)
        whole = replace(part, layer=part.source.block)
        folded = objective.masked.folded(stored if value is None else value.reshape(stored.shape), whole, masks)
        made = rescaled(part.cut(folded, kept, cut.before), part, cut.family, cut.before, cut.after, tied)
        # Adding zero turns -0 into +0, as for every trained weight.
        put(run, weights[part.name], made.to(stored.dtype) + 0)
