"""Gradients of a language model's loss, with one block in memory.

The loss is the cross-entropy of each next token, a mean over all scored tokens of all batches. Batches run in the
meta model's dtype; gradients of a weight are summed in fp32. With `squares` it is the squares of each batch's gradient: where
batches are samples, that is the diagonal of the empirical Fisher matrix of samples, but for a factor.
Forward, every batch goes from block to block (backward_batch.py). Backward, blocks come in reverse order; each is loaded, runs
every batch again with a graph, and is released. Arguments are stored on disk for every few blocks only (`stride` in
memory_estimate.py); for the blocks between they are computed again from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.spill import Spill
from compress.context import Context
from compress.corpus import Corpus
from compress.device import device_of
from compress.errors import CoverageError, InputError
from compress.executors.backward_batch import BackwardBatch
from compress.executors.train.student import Conversion
from compress.freed_memory import trim_memory
from compress.layerwise.batches import Batch, cut
from compress.layerwise.dense_view import DenseView
from compress.layerwise.hidden_state_offload import HiddenStateOffload
from compress.layerwise.logits import is_masked, label_of
from compress.layerwise.memory_estimate import BETWEEN_BYTES, computing, stride
from compress.layerwise.meta_model import Block, MetaModel
from compress.layerwise.stepwise import ForwardHooks
from compress.spec.weight_state import Weight

Take = Callable[[Weight, torch.Tensor], None]
"""Receives the gradient of a weight, fp32 in its stored shape."""


def begun(
    source: Checkpoint, tokens: Path | None, step: str, most: int, do: str, ctx: Context
) -> tuple[MetaModel, list[Batch], Context]:
    """The model that a sweep reads, batches of at most `most` tokens, and a context that names the step.

    Raises InputError for a model that predicts no next token; `do` is what to do instead.
    """
    assert tokens is not None
    device = device_of(ctx)
    meta_model = MetaModel(DenseView(source), computing(ctx.dtype, source.config, device), device)
    kind = type(meta_model.module).__name__
    if meta_model.module.get_output_embeddings() is None or is_masked(kind):
        raise InputError(label_of(source), "a language model that predicts the next token", kind, do)
    # GradientSweep does not know the step's name.
    named = replace(ctx, events=lambda event: ctx.events({**event, "step": step}))
    batches = cut(Corpus.load(tokens).tensors, meta_model.module, ctx.rank, ctx.world_size, meta_model.dtype, device, most)
    return meta_model, batches, named


class GradientSweep:
    """Computes gradients of `weights`, or sums of their squares; `folder` holds tensors that are stored in between."""

    def __init__(self, meta_model: MetaModel, weights: list[Weight], folder: Path, ctx: Context, squares: bool = False) -> None:
        self.meta_model, self.weights, self.folder, self.ctx, self.squares = meta_model, weights, folder, ctx, squares
        inside = tuple(f"{block.path}." for block in meta_model.blocks)
        self._outside = [weight for weight in weights if not weight.module.startswith(inside)]
        self._sizes = {
            block.path: sum(w.nbytes for w in meta_model.model.weights if w.module.startswith(f"{block.path}."))
            for block in meta_model.blocks
        }
        self.total = 0.0
        """Scored tokens of all processes, over which the loss is a mean."""
        self._sums: dict[str, torch.Tensor] = {}
        self._required: list[torch.nn.Parameter] = []
        self._paths = {path for weight in self._outside for path in self._made_of(weight)}

    def run(self, batches: list[Batch], take: Take) -> float:
        """Hands the gradient of every weight to `take`; returns the loss. Raises CoverageError, InputError, MachineError."""
        total = self._sum(sum(int(batch.scored.sum()) for batch in batches))
        self.total = total
        if not total:
            raise InputError("calibration", "a token to predict", "none", "calibrate on longer texts")
        spill = Spill(self.folder / str(self.ctx.rank))
        offload = HiddenStateOffload(self.folder, self.ctx.rank, BETWEEN_BYTES, self.meta_model.device)
        undo = self._require_outside()
        try:
            with ForwardHooks(self.meta_model) as hooks:
                walks = [self._walk(n, batch, self.meta_model, hooks, offload, spill) for n, batch in enumerate(batches)]
                blocks, every, loss = self._forward(walks, 1 / total)
                self._backward(walks, blocks, every, take)
            self._take(self._outside, sorted(self._paths), take)
        finally:
            undo()
            self.meta_model.release_visitors()
            offload.clear()
            spill.close()
            with suppress(OSError):
                self.folder.rmdir()
        return self._sum(loss) / total

    def _walk(self, number: int, *more: Any) -> BackwardBatch:
        return BackwardBatch(number, *more)

    def _forward(self, walks: list[BackwardBatch], weight: float) -> tuple[list[Block], int, float]:
        """(blocks in order, distance of blocks whose arguments are stored, this process's sum of losses)."""
        blocks: list[Block] = []
        loss = 0.0
        with torch.enable_grad():
            for walk in walks:
                walk.advance()
            every = stride(len(self.meta_model.blocks), sum(walk.state_bytes for walk in walks))
            while (call := walks[0].call) is not None:
                if call.block in blocks:
                    expected, got = "each block once in a forward", "a block that runs again"
                    raise CoverageError(call.block.path, expected, got, "use a pass that needs no gradients")
                with self._loaded(call.block):
                    for walk in walks:
                        assert walk.call is not None
                        assert walk.call.block == call.block
                        output = walk.first_run(len(blocks) % every == 0)
                        # Frees the old hidden states.
                        walk.call = None
                        walk.advance(output)
                        del output
                        if walk.call is None:
                            loss += walk.finish(weight)
                blocks.append(call.block)
                del call
                self._tell("forward", blocks)
        if not math.isfinite(loss):
            raise InputError("the loss on the calibration tokens", "a finite number", f"{loss}", "look at the source")
        return blocks, every, loss

    def _backward(self, walks: list[BackwardBatch], blocks: list[Block], every: int, take: Take) -> None:
        self._tell("backward", [])
        for start in range((len(blocks) - 1) // every * every, -1, -every):
            stop = min(len(blocks), start + every)
            for step in range(start, stop - 1):
                with self._loaded(blocks[step]), torch.no_grad():
                    for walk in walks:
                        walk.carry(blocks[step], step)
            for step in range(stop - 1, start - 1, -1):
                with self._loaded(blocks[step]):
                    self._one_block(walks, blocks[step], step, take)
                self._tell("backward", blocks[step:])
        for walk in walks:
            walk.leave()

    def _one_block(self, walks: list[BackwardBatch], block: Block, step: int, take: Take) -> None:
        mine = [weight for weight in self.weights if weight.module.startswith(f"{block.path}.")]
        parameters = {path for weight in mine for path in self.meta_model.made_of(weight.name)}
        for path in parameters:
            self._ask(path, self.meta_model.module.get_parameter(path))
        for walk in walks:
            walk.go_back(block, step)
        self._take(mine, sorted(parameters), take)

    def _ask(self, path: str, parameter: torch.nn.Parameter) -> None:
        """Makes a parameter require its gradient, and sums it over batches."""
        parameter.requires_grad_(True)

        def add(loaded: torch.Tensor) -> None:
            assert loaded.grad is not None
            grad = loaded.grad.float()
            if self.squares:
                grad.square_()
            self._sums[path] = self._sums[path].add_(grad) if path in self._sums else grad
            loaded.grad = None

        parameter.register_post_accumulate_grad_hook(add)

    def _take(self, weights: list[Weight], paths: list[str], take: Take) -> None:
        """Calls `take` with the gradients of `weights`, from those of the parameters that they become."""
        grads: dict[str, torch.Tensor] = {}
        logical, kept = self.meta_model.dense_view.logical, self.meta_model.model.duplicates
        for path in paths:
            group = self.meta_model.group_of(path)
            grad = self._sums.pop(path, None)
            if grad is None:
                grad = torch.zeros_like(self.meta_model.module.get_parameter(path), dtype=torch.float32, requires_grad=False)
            self.ctx.add_up(grad)
            shapes = [logical[source].shape for source in group.sources]
            parts = Conversion(self.meta_model.mapping, group, shapes).back(path, grad) if group.patterns else [grad]
            for source, part in zip(group.sources, parts, strict=True):
                name = kept.get(source, source)
                grads[name] = grads[name].add_(part) if name in grads else part
        for weight in weights:
            grad = grads.pop(weight.name).reshape(weight.shape)
            if not bool(grad.any()):
                do = "skip it, or calibrate on other texts"
                raise CoverageError(weight.name, "a weight that the loss depends on", "a gradient of zeros", do)
            take(weight, grad)

    def _require_outside(self) -> Callable[[], None]:
        """Makes parameters outside of blocks require gradients once their modules are called. Returns a function to undo it."""
        hooks = []
        for path in sorted(self._paths):
            owner, _, attribute = path.rpartition(".")

            def hook(module: torch.nn.Module, _: Any, path: str = path, attribute: str = attribute) -> None:
                parameter = module.get_parameter(attribute)
                if not parameter.requires_grad:
                    self._ask(path, parameter)
                    self._required.append(parameter)

            hooks.append(self.meta_model.module_at(owner).register_forward_pre_hook(hook))

        def undo() -> None:
            for handle in hooks:
                handle.remove()
            for parameter in self._required:
                parameter.requires_grad_(False)

        return undo

    def _made_of(self, weight: Weight) -> list[str]:
        """The parameters that a weight and its copies on disk become."""
        copies = [alias for alias, kept in self.meta_model.model.duplicates.items() if kept == weight.name]
        return [path for name in (weight.name, *copies) for path in self.meta_model.made_of(name)]

    @contextmanager
    def _loaded(self, block: Block) -> Iterator[None]:
        self.meta_model.release_visitors()
        self.meta_model.load(block.path)
        yield
        self.meta_model.release(block.path)
        trim_memory()

    def _tell(self, direction: str, done: list[Block]) -> None:
        self.ctx.tell(
            "progress", step=direction, phase=f"gradients {direction}", weight=done[-1].path if done else "",
            total_bytes=sum(self._sizes.values()), done_bytes=sum(self._sizes[block.path] for block in done),
            unit="blocks", total=len(self._sizes), done=len(done),
        )  # fmt: skip

    def _sum(self, number: float) -> float:
        """The sum over processes."""
        box = torch.tensor(number, dtype=torch.float64)
        self.ctx.add_up(box)
        return float(box)
