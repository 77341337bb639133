"""Output Grams: sums of g g^T, g the gradient of the loss by a weight's outputs.

A gradient sweep (gradients.py) over the unchanged model, one block in memory, before anything is solved. Labels are drawn from
what the model predicts, so the sum is the Fisher matrix of a layer's outputs (Kronecker's factor of it, as in K-FAC), and the
Hessian of the KL. It is kept beside the step until that is done: a crash afterwards costs a block, and before it this sweep.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.atomic import write_text
from compress.context import Context
from compress.contract.shapes import ObservingPass
from compress.device import CPU, made_on
from compress.executors.across import add_up
from compress.executors.backward_batch import BackwardBatch
from compress.executors.gradients import GradientSweep, Take, begun
from compress.executors.step_run import StepRun
from compress.freed_memory import trim_memory
from compress.layerwise.memory_estimate import batch_tokens
from compress.layerwise.meta_model import Block
from compress.numerics.output_feedback import OutputGrams
from compress.spec.weight_state import Weight

FOLDER, GRADIENTS, DONE = ".outputs", ".gradients", "done"
"""In the .tmp of a step: the matrices, what the gradient sweep sets aside, and that it is through."""


class KeptGrams:
    """The Gram matrices of a step's weights, on disk."""

    def __init__(self, step: Path | None = None, weights: Sequence[Weight] = ()) -> None:
        """`step` is the directory that the step writes; none for a step that weighs no outputs."""
        self.folders = [] if step is None else [step / FOLDER, step / GRADIENTS]
        self.files = {weight.name: self.folders[0] / f"{number}.safetensors" for number, weight in enumerate(weights)}

    def read(self, weight: Weight, device: torch.device) -> list[torch.Tensor] | None:
        """G of each segment of a weight's rows; None for one that has none."""
        file = self.files.get(weight.name)
        if file is None:
            return None
        parts = load_file(file)
        return [parts[str(number)].to(device) for number in range(len(parts))]

    def write(self, weight: Weight, grams: list[torch.Tensor]) -> None:
        self.files[weight.name].parent.mkdir(parents=True, exist_ok=True)
        save_file({str(number): gram.to(CPU) for number, gram in enumerate(grams)}, self.files[weight.name])

    def drop(self, ctx: Context) -> None:
        """Removes them, once all processes are through."""
        ctx.barrier()
        for folder in self.folders if ctx.is_main else ():
            shutil.rmtree(folder, ignore_errors=True)


def output_grams(run: StepRun) -> KeptGrams:
    """The Gram matrices for a step that weighs outputs, computed unless an interrupted run has done so; else none.

    None either where an interrupted run has solved everything. Raises CompressError.
    """
    assert isinstance(run.pass_, ObservingPass)
    if not run.pass_.weighs_outputs():
        return KeptGrams()
    if all(run.writer.is_done(weight.name) for weight in run.touched):
        return KeptGrams(run.writer.path)
    weights, ctx = [weight for weight in run.touched if weight.experts is None and weight.kind != "expert"], run.ctx
    kept, done = KeptGrams(run.writer.path, weights), run.writer.path / FOLDER / DONE
    if not ctx.broadcast(done.is_file()):
        most, do = batch_tokens(run.source.config), "leave feedback=both out"
        meta_model, batches, named = begun(run.source, run.tokens, run.step.name, most, do, ctx)

        def take(weight: Weight, grams: Any) -> None:
            if ctx.is_main:
                kept.write(weight, grams)

        OutputSweep(meta_model, weights, run.writer.path / GRADIENTS, named).run(batches, take)
        if ctx.is_main:
            write_text(done, "")
        ctx.barrier()
        trim_memory()
    return kept


class OutputSweep(GradientSweep):
    """Hands over a list of Gram matrices for each weight instead of its gradient."""

    def _walk(self, number: int, *more: Any) -> BackwardBatch:
        walk = super()._walk(number, *more)
        walk.seed = (self.ctx.rank << 32) + number
        return walk

    def _one_block(self, walks: list[BackwardBatch], block: Block, step: int, take: Take) -> None:
        mine = [weight for weight in self.weights if weight.module.startswith(f"{block.path}.")]
        held = self._watched(mine, walks, block, step)
        for weight in mine:
            for part in held[weight.name].sums:
                add_up(self.ctx, part)
            take(weight, held.pop(weight.name).means())  # type: ignore[arg-type]

    def _watched(self, mine: list[Weight], walks: list[BackwardBatch], block: Block, step: int) -> dict[str, OutputGrams]:
        """Goes back through a block, and adds up what its weights are felt by."""
        held = {weight.name: made_on(self.meta_model.device, OutputGrams, weight.out_features) for weight in mine}
        hooks = [
            self.meta_model.module_at(path).register_forward_hook(_watches(held[weight.name]))
            for weight in mine
            for path in self.meta_model.readers(weight.name)
        ]
        for walk in walks:
            self._go_back(walk, block, step)
        for hook in hooks:
            hook.remove()
        return held

    def _go_back(self, walk: BackwardBatch, block: Block, step: int) -> None:
        walk.go_back(block, step)


def _watches(grams: OutputGrams) -> Callable[..., torch.Tensor | None]:
    """A forward hook that adds the gradients of a module's outputs."""

    def hook(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        # In the first block nothing before a linear needs a gradient.
        found = output if output.requires_grad else output.detach().requires_grad_()
        found.register_hook(lambda gradient: grams.add(gradient.flatten(0, -2).detach()))
        return found

    return hook
