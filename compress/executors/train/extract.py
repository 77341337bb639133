"""Extract: writes the smaller model that a training run has found.

The masks of what is kept are folded into its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from compress.architecture.axes import rescaled
from compress.executors.sliced import check, keep, put
from compress.executors.step_run import StepRun
from compress.executors.train.mask_objective import MaskObjective


def extract(run: StepRun, objective: MaskObjective, trained: Callable[[str], torch.Tensor | None]) -> None:
    """Writes every tensor of the smaller model; `trained` is a weight's trained value, None for one that was not trained."""
    cut = run.step.cut
    assert cut is not None
    kept, masks = objective.settled()
    check(kept, cut)
    if run.ctx.is_main:
        keep(run, kept)
    weights = {weight.name: weight for weight in run.weights}
    for part in cut.parts(kept):
        value = trained(part.source.name)
        if not run.ctx.is_main or run.writer.is_done(part.name):
            continue
        stored = run.source.read(part.source.name)
        whole = replace(part, layer=part.source.block)
        folded = objective.masked.folded(stored if value is None else value.reshape(stored.shape), whole, masks)
        made = rescaled(part.cut(folded, kept, cut.before), part, cut.family, cut.before, cut.after, cut.tied)
        # Adding zero turns -0 into +0, as for every trained weight.
        put(run, weights[part.name], made.to(stored.dtype) + 0)
