"""Output fit: fits output projections, by least squares, to fewer inputs.

With C the mean of x x^T over the calibration tokens and K the kept inputs, W' = W C[:, K] (C[K, K] + lambda I)^-1 has the least
squared error of outputs. It is done for attention outputs and down projections, whose inputs lose heads and neurons, block by
block on the activations of the source, and each matrix is written and journaled at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from compress.architecture.axes import Slice
from compress.architecture.experts import MIDDLE, Routed
from compress.device import made_on
from compress.errors import InputError
from compress.executors.forward_sweep import ForwardSweep
from compress.executors.sliced import put
from compress.executors.step_run import StepRun
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.meta_model import Block
from compress.layerwise.stepwise import ForwardHooks, Key
from compress.numerics.hessian import Hessian
from compress.numerics.output_fit import fitted
from compress.spec.kept import Kept
from compress.spec.weight_state import Weight


def refit(run: StepRun, kept: Kept, parts: Sequence[Slice]) -> None:
    """Writes the matrices that are fitted anew and not journaled yet."""
    sizes = {weight.name: weight for weight in run.weights}
    wanted = [part for part in parts if _fits(part, kept, run) and not run.writer.is_done(part.name)]
    if run.ctx.broadcast(bool(wanted)):
        Refit(run, kept, wanted, sizes).all_blocks()


def _fits(part: Slice, kept: Kept, run: StepRun) -> bool:
    """Whether a matrix has fewer inputs than before, for a reason that is known block by block."""
    cut = run.step.cut
    assert cut is not None
    word = _inputs(part)
    if part.source.kind not in ("linear", "expert") or word not in ("queries", "units") or part.source.experts is not None:
        return False
    return part.numbers(kept, cut.before)[_axis(part)] is not None


def _axis(part: Slice) -> int:
    """The stored dimension of a matrix that counts its inputs."""
    return len(part.dims) - (2 if part.source.transposed else 1)


def _inputs(part: Slice) -> str:
    return part.dims[_axis(part)] if len(part.dims) > 1 else ""


class Refit:
    """One sweep over the blocks of the source."""

    def __init__(self, run: StepRun, kept: Kept, parts: Sequence[Slice], sizes: dict[str, Weight]) -> None:
        self.run, self.kept, self.weights = run, kept, sizes
        self.parts: dict[int, list[Slice]] = defaultdict(list)
        for part in parts:
            assert part.source.block is not None
            self.parts[part.source.block].append(part)
        self.sweep = ForwardSweep(run)

    def all_blocks(self) -> None:
        """Fits every matrix."""
        self.sweep.all_blocks(self.block)

    def block(self, block: Block, probe: BatchWalk, walks: list[BatchWalk], hooks: ForwardHooks) -> None:
        """Fits the matrices of one block, one after the other, and takes all batches through it."""
        meta_model, parts = self.sweep.meta_model, self.parts.get(block.index, [])
        keys: dict[str, Key] = {}
        for part in parts:
            weight = part.source
            routed = part.expert is not None and weight.attribute != "weight"
            keys[part.name] = (
                (weight.module, MIDDLE) if routed or weight.kind == "expert" else (meta_model.readers(weight.name)[0], "")
            )
        forget = hooks.watch({path: which == MIDDLE for path, which in keys.values()})
        order = [key for key, _ in probe.survey() if key in keys.values()] if parts else []
        for key in dict.fromkeys(order):
            for part in (part for part in parts if keys[part.name] == key):
                self.one(part, self.statistic(part, key, walks))
        forget()
        for walk in walks:
            self.sweep.on(walk)
        self.run.ctx.tell(
            "progress", step=self.run.step.name, phase="refit", weight=block.path, total_bytes=1, done_bytes=0, unit="blocks",
            total=len(meta_model.blocks), done=block.index + 1,
        )  # fmt: skip

    def statistic(self, part: Slice, key: Key, walks: list[BatchWalk]) -> Hessian:
        """The products of a matrix's inputs, over all batches and processes."""
        width = part.source.in_features
        hessian: Hessian = made_on(self.sweep.meta_model.device, Hessian, width)
        for walk in walks:
            try:
                x = walk.until(key)
            except LookupError:
                continue
            assert walk.call is not None
            valid = walk.batch.valid(x if isinstance(x, torch.Tensor) else None, walk.call)
            if isinstance(x, Routed):
                assert part.expert is not None
                rows, tokens = x.of(part.expert)
                hessian.add(rows if valid is None else rows[valid[tokens]])
            else:
                rows = x.reshape(-1, width)
                hessian.add(rows if valid is None else rows[valid])
        for sums in (tokens_ := torch.tensor(hessian.tokens), *hessian.parts()):
            self.run.ctx.add_up(sums)
        hessian.tokens = int(tokens_)
        return hessian

    def one(self, part: Slice, hessian: Hessian) -> None:
        """Fits, writes and journals one matrix."""
        run, weight = self.run, part.source
        cut = run.step.cut
        assert cut is not None
        value = run.source.read(weight.name)
        numbers = part.numbers(self.kept, cut.before)
        inputs = numbers[_axis(part)]
        assert inputs is not None
        w = (value.T if weight.transposed else value).to(self.sweep.meta_model.device)
        notes = {}
        if hessian.tokens:
            try:
                new, before, after = fitted(w, hessian.mean(), torch.tensor(inputs, device=w.device))
            except ValueError as error:
                raise InputError(f"what '{weight.name}' reads", "finite activations", str(error), "try --dtype float32") from None
            facts = {"output_error": after, "output_error_without_refit": before}
        else:
            new, facts = w[:, inputs], {}
            notes = {"notes": [["unrouted", "no calibration token: its outputs were not fitted anew"]]}
        outputs = numbers[1 - _axis(part)]
        new = new if outputs is None else new[torch.tensor(outputs, device=new.device)]
        made = (new.T if weight.transposed else new).to(value.dtype).cpu().contiguous()
        if run.ctx.rank == sum(part.name.encode()) % run.ctx.world_size:
            put(run, self.weights[part.name], made, {**facts, **notes})
