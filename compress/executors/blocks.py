"""Blocks: runs a BlockTrainPass over a checkpoint, one block in memory at a time.

Two models go from block to block side by side: the student, and its dense twin. For each block: the twin's block is loaded and
gives the targets, then the student's, which is trained towards them, written, and replaced in the student, so that the next
block is trained on what this one has become. Hidden states of both and the targets share one budget of memory.

A trained block is written and journaled at once. After a crash it is read back, and only its outputs are computed again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from compress.checkpoint.reader import torch_dtype
from compress.contract.block_training import BlockTrainPass
from compress.device import device_of
from compress.errors import CoverageError, InputError
from compress.executors.anomalies import watch
from compress.executors.backward_batch import refuse_shared
from compress.executors.block_trainer import BlockTrainer, Outcome, divided
from compress.executors.step_run import StepRun
from compress.executors.stream import check_mask, stream
from compress.executors.teacher import check_twin
from compress.executors.train.block_student import BlockStudent, copied
from compress.executors.train.code_student import BlockCodeStudent
from compress.executors.train.record import Record
from compress.freed_memory import trim_memory
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.batches import cut
from compress.layerwise.dense_view import DenseView
from compress.layerwise.hidden_state_offload import HiddenStateOffload
from compress.layerwise.input_rounding import round_as_told
from compress.layerwise.memory_estimate import BETWEEN_BYTES, computing
from compress.layerwise.meta_model import Block, MetaModel
from compress.layerwise.model import Loader
from compress.layerwise.stepwise import Call, ForwardHooks
from compress.numerics import qtensor
from compress.spec.weight_state import TensorSpec, Weight
from compress.spec.weight_state import blocks as count_of

Parts = dict[str, torch.Tensor]
"""The tensors of a weight by their names on disk."""


def blocks(run: StepRun) -> dict[str, float]:
    """Trains every block that is not journaled yet. Returns the seconds of each kind of work."""
    stream(run.untouched())
    assert run.teacher is not None
    check_twin(run.teacher, run.touched)
    dtype, device = computing(run.ctx.dtype, run.source.config), device_of(run.ctx)
    student, twin = (MetaModel(DenseView(model), dtype, device) for model in (run.source, run.teacher))
    with torch.no_grad(), ForwardHooks(student) as hooks, ForwardHooks(twin) as twin_hooks:
        training = BlockTraining(run, hooks, twin_hooks)
        training.all_blocks()
    trim_memory()
    return {name: round(seconds, 3) for name, seconds in training.seconds.items()}


class BlockTraining:
    """The student and its twin, side by side, and the training of each block."""

    def __init__(self, run: StepRun, hooks: ForwardHooks, twin_hooks: ForwardHooks) -> None:
        assert isinstance(run.pass_, BlockTrainPass)
        self.run, self.step, self.pass_, self.writer, self.ctx = run, run.step, run.pass_, run.writer, run.ctx
        self.options, self.states = run.pass_.block_options(), run.step.after
        self.hooks, self.student, self.loader = hooks, hooks.meta_model, Loader(hooks.meta_model)
        self.twin_hooks, self.twin = twin_hooks, twin_hooks.meta_model
        corpus = run.corpus()
        self.samples = max(1, min(self.options.micro_batch, corpus.samples // self.ctx.world_size))
        batches = cut(
            corpus.tensors, self.student.module, self.ctx.rank, self.ctx.world_size, self.student.dtype, self.student.device,
            most=self.samples * max(1, _length(corpus.tensors)),
        )  # fmt: skip
        count = -(-corpus.samples // self.samples)
        first = count * self.ctx.rank // self.ctx.world_size
        self.micros = divided(count, range(first, first + len(batches)), self.options.held_out)
        self.offload = HiddenStateOffload(self.writer.path, self.ctx.rank, BETWEEN_BYTES, self.student.device)
        self.walks = [BatchWalk(batch, hooks, self.offload) for batch in batches]
        alone = self.options.target == "local"
        self.twins = [] if alone else [BatchWalk(batch, twin_hooks, self.offload) for batch in batches]
        self.targets: dict[int, Call] = {}
        self.block: Any = None
        self.record = Record(self.writer.path, self.step.name)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def spent(self, on: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[on] += time.perf_counter() - started

    def all_blocks(self) -> None:
        """Goes through the blocks until all targeted ones are trained."""
        remaining = {weight.name: weight for weight in self.run.touched}
        whole, total = count_of(remaining.values()), sum(weight.nbytes for weight in remaining.values())
        self.offload.clear()
        tokens = self.record.back_to(self.finished(list(remaining.values()))) if self.ctx.is_main else 0
        with self.spent("forward"):
            for walk in (*self.walks, *self.twins):
                walk.set_out()
        seen: set[str] = set()
        while remaining and self.walks[0].call is not None:
            block = self.walks[0].call.block
            if block.path in seen:
                expected, got = "each block once in a forward", "a block that runs again"
                raise CoverageError(block.path, expected, got, "train the whole model, as distill.logits does")
            seen.add(block.path)
            mine = [remaining.pop(name) for name, w in list(remaining.items()) if w.module.startswith(f"{block.path}.")]
            done, last = whole - count_of(remaining.values()), not remaining
            kept = sum(self.writer.is_done(weight.name) for weight in mine)
            learned = [weight for weight in mine if self.pass_.learns(self.states[weight.name])] if kept < len(mine) else []
            self.follow(block, bool(learned), last)
            losses: dict[str, float] = {}
            if kept == len(mine):
                parts = {weight.name: self.read(self.writer.read, weight) for weight in mine}
            elif learned:
                parts, notes, outcome = self.train(block, learned)
                tokens += outcome.tokens
                losses = {"start": outcome.start, "loss": outcome.end}
                if self.ctx.is_main:
                    # A line before the weights: a run that goes on drops those of blocks that are not finished.
                    self.record.add(step=done, **losses, tokens=tokens)
                    self.record.keep()
                self.write(mine, parts, notes, outcome.changed)
            else:
                parts = {}
                self.write(mine, parts, {}, False)
            self.ctx.tell(
                "progress", step=self.step.name, phase="train", weight=block.path, kept=kept, total_bytes=total,
                done_bytes=total - sum(weight.nbytes for weight in remaining.values()), **losses,
                unit="blocks", total=whole, done=done,
            )  # fmt: skip
            if not last:
                self.go_on(block, [weight for weight in mine if weight.name in parts], parts)
            del parts
            trim_memory()
        for walk in (*self.walks, *self.twins):
            walk.leave()
        self.offload.clear()
        if remaining:
            raise CoverageError(
                ", ".join(list(remaining)[:3]), "weights that the model's forward reads", "no batch that reached them",
                "skip them, or calibrate on inputs that do",
            )  # fmt: skip

    def finished(self, weights: list[Weight]) -> int:
        """How many blocks an interrupted run has finished."""
        return count_of(weights) - count_of(weight for weight in weights if not self.writer.is_done(weight.name))

    def follow(self, block: Block, aims: bool, last: bool) -> None:
        """Takes the twin through the block; where the student `aims` at its outputs, they become the targets."""
        if not aims and (last or not self.twins):
            return
        self.twin.release_visitors()
        with self.spent("load"):
            self.twin.load(block.path)
        with self.spent("forward"):
            for number, walk in zip(self.micros.own, self.walks, strict=True):
                output = self.twin_output(walk, self.twins[number - self.micros.own.start] if self.twins else None)
                if aims:
                    # Cloned, for the output itself becomes the next block's input, and is put aside with it.
                    self.targets[number] = Call(block, (_hidden(output).clone(),), {})
                    self.offload.park(("target", number), self.targets[number])
                if self.twins and not last:
                    self.twins[number - self.micros.own.start].hand_on(output)
                del output
        self.twin.release(block.path)
        trim_memory()

    def twin_output(self, walk: BatchWalk, twin: BatchWalk | None) -> Any:
        """What the twin's block returns: in its own stream, or for the inputs of the student's block."""
        assert walk.call is not None
        expected, there = walk.call.block.path, walk.call if twin is None else twin.call
        got = there.block.path if there is not None else "the end of the model"
        if got != expected:
            raise InputError("the dense twin", f"{expected}, the student's block", got, "name another teacher")
        call = (twin or walk).arguments()
        given = tree_leaves((call.args, call.kwargs))
        output = self.twin_hooks.visit(call).finish()
        # Its forward is run many times, with the same arguments.
        refuse_shared(call.block, given, tree_leaves((call.args, call.kwargs)))
        if twin is None:
            walk.step_back()
        return output

    def train(self, block: Block, weights: list[Weight]) -> tuple[dict[str, Parts], dict[str, list[tuple[str, str]]], Outcome]:
        """(tensors on disk of the weights that have changed, what there is to say of some, losses) of a block's training."""
        self.student.release_visitors()
        with self.spent("train"), copied(self.student, block.path):
            made = self.made(block.path, weights)
            self.block = made.block
            trainer = BlockTrainer(
                made, self.pair, self.pass_.loss, self.micros, self.samples, self.options, block.path, self.ctx
            )  # fmt: skip
            outcome = trainer.train()
            parts = {weight.name: made.written(weight) for weight in weights} if outcome.changed else {}
            notes = {weight.name: _missed(weight, trainer.reached, made.learned(weight.name)) for weight in weights}
        self.block = None
        self.targets.clear()
        return parts, notes if outcome.tokens else {}, outcome

    def made(self, path: str, weights: list[Weight]) -> BlockStudent:
        """A block with what is trained of it."""
        if not self.pass_.learns_codes():
            return BlockStudent(self.loader, path, weights, self.states)
        parent = self.run.dense_parent
        assert parent is not None
        return BlockCodeStudent(self.loader, path, weights, self.states, parent.find)

    @contextmanager
    def pair(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The outputs of the student's block and of its twin for the tokens of a micro-batch that count, [tokens, width]."""
        walk, owner = self.walks[number - self.micros.own.start], ("target", number)
        call = walk.arguments()
        self.offload.fetch(owner)
        dtype = self.student.dtype
        with torch.autocast(self.student.device.type, dtype, enabled=dtype is not torch.float32):
            output = _hidden(self.block.forward(*call.args, **call.kwargs))
        valid = walk.batch.valid(output, call)
        rows = [x.reshape(-1, x.shape[-1]).float() for x in (output, self.targets[number].args[0])]
        del output
        one, other = rows if valid is None else [x[valid] for x in rows]
        yield one, other
        walk.step_back()
        self.offload.park(owner, self.targets[number], unchanged=True)

    def read(self, read: Callable[[TensorSpec], torch.Tensor], weight: Weight) -> Parts:
        """The tensors on disk of a weight, by a function that reads one."""
        return {spec.name: read(spec) for spec in qtensor.specs(weight, self.states[weight.name])}

    def value(self, weight: Weight, parts: Parts) -> Any:
        """A weight as codes, or as a matrix [experts?, rows, columns]."""
        after = self.states[weight.name]
        return qtensor.as_matrix(weight, parts[weight.name]) if after.scheme is None else qtensor.decode(weight, after, parts)

    def write(
        self, weights: list[Weight], parts: dict[str, Parts], notes: dict[str, list[tuple[str, str]]], changed: bool
    ) -> None:  # fmt: skip
        """Writes a block's weights and journals them; what has not changed is written as it was."""
        for weight in weights if self.ctx.is_main else ():
            if self.writer.is_done(weight.name):
                continue
            with self.spent("write"):
                after, said = self.states[weight.name], list(notes.get(weight.name, ()))
                new = parts.get(weight.name) or self.read(lambda spec: self.run.source.read(spec.name), weight)
                value = self.value(weight, new)
                if after.sparsity is not None:
                    check_mask(weight, after.sparsity, value)
                if weight.name in parts:
                    said += watch(weight, value, None, partial(self.before, weight), "lower lr or scale_lr, or raise warmup")
                elif self.pass_.learns(after):
                    said.append(("unimproved", "its block is left as it was: no iterate had less loss"))
                digests = {name: self.writer.put(name, part) for name, part in new.items()}
                # The error of pruning or rounding that an earlier step measured no longer holds.
                facts: dict[str, Any] = {"error": None, "output_error": None} if weight.name in parts else {}
                self.writer.record(weight.name, digests, {**facts, **({"notes": said} if said else {})})

    def before(self, weight: Weight) -> torch.Tensor:
        """A weight before training, [experts?, rows, columns]."""
        return qtensor.as_matrix(weight, self.student.dense_view.dense(weight.name))

    def go_on(self, block: Block, changed: list[Weight], parts: dict[str, Parts]) -> None:
        """Takes the student through the block, with these weights of it replaced."""
        self.student.release_visitors()
        with self.spent("load"):
            self.student.load(block.path)
            self.student.replace({weight.name: self.dense(weight, parts[weight.name]) for weight in changed})
        round_as_told(self.student, f"{block.path}.")
        with self.spent("forward"):
            for walk in self.walks:
                walk.go_on()
        self.student.release(block.path)

    def dense(self, weight: Weight, parts: Parts) -> torch.Tensor:
        """A new value, dequantized, in the stored shape and dtype."""
        value = self.value(weight, parts)
        if isinstance(value, qtensor.QTensor):
            value = value.dequantize().to(torch_dtype(weight.dtype))
        return qtensor.as_matrix(weight, value)


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states among a block's outputs: its first tensor."""
    found: torch.Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return found


def _length(tensors: dict[str, torch.Tensor]) -> int:
    """Tokens of a sample, as batches count them."""
    return tensors["input_ids"].shape[1] if "input_ids" in tensors else next(iter(tensors.values()))[0].numel()


def _missed(weight: Weight, reached: dict[str, torch.Tensor], names: list[str]) -> list[tuple[str, str]]:
    """What there is to say of a weight that no gradient has reached, or of its experts."""
    found = torch.stack([reached[name] for name in names[:1]]).any(0) if weight.experts else reached[names[0]].any(0, True)
    if bool(found.all()):
        return []
    if weight.kind != "expert":
        return [("untrained", "no gradient reached it")]
    missed = "" if weight.experts is None else f"{int((~found).sum())} of {len(found)} experts: "
    return [("untrained", f"{missed}no calibration token at all")]
