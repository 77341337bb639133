"""Sweep: runs an ObservingPass over a checkpoint, one block in memory at a time.

For each block: load it, run every batch up to the first inputs that its weights read, add them to the statistics, solve these
weights, replace them in the model, and run the batches on. So the inputs that a weight is calibrated on come from weights
that are already solved, inside the block as well as before it. Weights that read the same tensor share a statistic; a first
forward of the block finds out which do. Every routed expert has a statistic of its own, over its own tokens.

A solved weight is written and journaled at once. After a crash it is read back, and only its outputs are computed again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from compress.architecture.experts import INPUT, MIDDLE, Routed, experts_of
from compress.contract.fused_groups import Peaks
from compress.contract.shapes import LinearPass, ObservingPass
from compress.contract.tasks import MatrixTask, Observer, Solution
from compress.device import CPU, device_of, made_on, moved
from compress.errors import CoverageError, InputError
from compress.executors.across import add_up
from compress.executors.anomalies import watch
from compress.executors.input_peaks import InputPeaks
from compress.executors.output_grams import KeptGrams, output_grams
from compress.executors.solved import Part, dense_of, facts_of, joined, stacks_of
from compress.executors.step_run import StepRun
from compress.executors.stream import check_mask, stream
from compress.freed_memory import trim_memory
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.batches import Batch, cut
from compress.layerwise.dense_view import DenseView
from compress.layerwise.hidden_state_offload import HiddenStateOffload
from compress.layerwise.input_rounding import round_as_told, round_inputs
from compress.layerwise.memory_estimate import BETWEEN_BYTES, HELD_BYTES, STATISTICS_BYTES, computing
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.stepwise import ForwardHooks, Key
from compress.numerics import qtensor
from compress.numerics.inputs import InputRounding
from compress.numerics.rounding import unstacked
from compress.spec.weight_state import Weight, blocks


def sweep(run: StepRun) -> dict[str, float]:
    """Writes every weight that is not journaled yet. Returns the seconds of each kind of work."""
    return sweep_by(run, Sweep)


def sweep_by(run: StepRun, kind: type[Sweep]) -> dict[str, float]:
    """`sweep` with another class of Sweep."""
    stream(run.untouched())
    ctx, grams = run.ctx, output_grams(run)
    meta_model = model_of(run)
    batches = cut(run.corpus().tensors, meta_model.module, ctx.rank, ctx.world_size, meta_model.dtype, meta_model.device)
    with torch.no_grad(), ForwardHooks(meta_model) as hooks:
        made = kind(run, meta_model, hooks, batches)
        made.grams = grams
        made.all_blocks(run.touched)
    grams.drop(ctx)
    trim_memory()
    return {name: round(seconds, 3) for name, seconds in made.seconds.items()}


def model_of(run: StepRun) -> MetaModel:
    """The model that a step reads, with nothing loaded."""
    return round_as_told(MetaModel(DenseView(run.source), computing(run.ctx.dtype, run.source.config), device_of(run.ctx)))


class Sweep:
    """One sweep over the blocks; `block` handles each of them."""

    phase: ClassVar[str] = "solve"
    input_peaks = InputPeaks([], CPU)
    """Of the weights that are solved now; at first they measure nothing."""
    grams = KeptGrams()

    def __init__(self, run: StepRun, meta_model: MetaModel, hooks: ForwardHooks, batches: list[Batch]) -> None:
        assert isinstance(run.pass_, ObservingPass)
        self.pass_: Observer = run.pass_
        self.step, self.writer, self.ctx, self.folder = run.step, run.writer, run.ctx, run.writer.path
        self.meta_model, self.hooks, self.batches, self.dense_parent = meta_model, hooks, batches, run.dense_parent
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def spent(self, on: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[on] += time.perf_counter() - started

    def all_blocks(self, weights: list[Weight]) -> None:
        """Goes through the blocks until all weights are solved."""
        self.peaks = Peaks(weights, self.step.after, self.meta_model.dense_view.dense)
        remaining = {weight.name: weight for weight in weights}
        total = sum(weight.nbytes for weight in weights)
        offload = HiddenStateOffload(self.folder, self.ctx.rank, BETWEEN_BYTES, self.meta_model.device)
        offload.clear()
        # A single sample runs first, to find out which weights read which tensors.
        probe = BatchWalk(self.batches[0].first(), self.hooks, offload)
        self.walks = [BatchWalk(batch, self.hooks, offload) for batch in self.batches]
        self.set_out(probe, offload)
        seen: set[str] = set()
        while remaining and probe.call is not None:
            block = probe.call.block
            if block.path in seen:
                raise CoverageError(
                    block.path, "each block once in a forward", "a block that runs again", "use a pass without data"
                )
            seen.add(block.path)
            self.meta_model.release_visitors()
            self.load(block.path)
            mine = [weight for weight in remaining.values() if weight.module.startswith(f"{block.path}.")]
            kept = self.block(block.path, mine, probe) if mine else 0
            for weight in mine:
                del remaining[weight.name]
            self.ctx.tell(
                "progress", step=self.step.name, phase=self.phase, weight=block.path, kept=kept, total_bytes=total,
                done_bytes=total - sum(weight.nbytes for weight in remaining.values()),
                unit="blocks", total=blocks(weights), done=blocks(weights) - blocks(remaining.values()),
            )  # fmt: skip
            if not remaining:
                break
            self.go_on(probe, block.path)
            trim_memory()
        self.leave(probe)
        offload.clear()
        if remaining:
            raise CoverageError(
                ", ".join(list(remaining)[:3]), "weights that the model's forward reads", "no batch that reached them",
                "skip them, or calibrate on inputs that do",
            )  # fmt: skip

    def set_out(self, probe: BatchWalk, offload: HiddenStateOffload) -> None:
        """Takes all batches to the first block."""
        with self.spent("forward"):
            for walk in (probe, *self.walks):
                walk.set_out()

    def load(self, path: str) -> None:
        """Loads the block that all batches have reached."""
        with self.spent("load"):
            self.meta_model.load(path)

    def go_on(self, probe: BatchWalk, path: str) -> None:
        """Takes all batches through the block to the next one, and releases it."""
        with self.spent("forward"):
            for walk in (probe, *self.walks):
                walk.go_on()
        self.meta_model.release(path)

    def leave(self, probe: BatchWalk) -> None:
        """Aborts all forwards."""
        for walk in (probe, *self.walks):
            walk.leave()

    def block(self, path: str, weights: list[Weight], probe: BatchWalk) -> int:
        """Solves the weights of one block, one input tensor after the other; returns how many were journaled already."""
        kept = 0
        for key, members in self.spaces(path, weights, probe):
            done = {weight.name: self.writer.is_done(weight.name) for weight in members}
            pending = [weight for weight in members if not done[weight.name]]
            solved = [weight for weight in members if done[weight.name]]
            self.replace({weight.name: self.read_back(weight) for weight in solved})
            kept += len(solved)
            trim_memory()  # the gaps left by these tensors do not fit those of the next batches
            if pending:
                solve = self.experts if key[1] else self.linears
                solve(key, pending)
        return kept

    def spaces(self, path: str, weights: list[Weight], probe: BatchWalk) -> Iterator[tuple[Key, list[Weight]]]:
        """The tensors that weights of a block read, by a reader of each, in the order of a forward. Raises CoverageError."""
        readers = {weight.name: self.readers(weight) for weight in weights}
        forget = self.hooks.watch({key: bool(which) for keys in readers.values() for key, which in keys})
        with self.spent("forward"):
            spaces = read_alike(probe.survey(), path)
        held = {weight.name: [space for space in spaces if not readers[weight.name].isdisjoint(space)] for weight in weights}
        if missed := [name for name, found in held.items() if not found]:
            raise CoverageError(
                ", ".join(missed[:3]), "weights that a forward of their block reads", "nothing observed", "skip them"
            )
        if torn := [name for name, found in held.items() if len(found) > 1]:
            raise CoverageError(torn[0], "a weight whose parts read one tensor", "parts that read several", "skip it")
        for space in spaces:
            yield space[0], [weight for weight in weights if held[weight.name][0] is space]
        forget()

    def readers(self, weight: Weight) -> set[Key]:
        """The readers of the inputs that a weight is calibrated on: its modules, or the experts that it belongs to."""
        if weight.kind == "expert" and weight.attribute != "weight":
            return {(weight.module, MIDDLE if weight.attribute.startswith("down") else INPUT)}
        return {(path, "") for path in self.meta_model.readers(weight.name)}

    def linears(self, key: Key, weights: list[Weight]) -> None:
        """Solves the weights that read one tensor, from one statistic."""
        self.input_peaks = peaks = InputPeaks([self.step.after[weight.name] for weight in weights], self.meta_model.device)
        statistic = self.observe(key, weights[0])
        solved = self.solve([(weight, None) for weight in weights], {None: statistic})
        for weight in weights:
            self.replace({weight.name: self.keep(weight, {None: peaks.put(solved.pop((weight.name, None)))})})

    def observe(self, key: Key, weight: Weight) -> Any:
        """The statistic of a weight's inputs over all batches."""
        statistic = self.statistic(weight)
        for walk, x, valid in self.inputs(key):
            assert isinstance(x, torch.Tensor)
            rows = x.reshape(-1, x.shape[-1])
            rows = rows if valid is None else rows[valid]
            with self.spent("statistics"):
                self.input_peaks.see(rows)
                self.add(statistic, walk, rows, valid)
        self.add_up(statistic)
        self.input_peaks.add_up(self.ctx)
        if not statistic.tokens:
            raise CoverageError(weight.name, "calibration tokens", "none that reached it", "calibrate on other texts")
        return statistic

    def statistic(self, weight: Weight) -> Any:
        return made_on(self.meta_model.device, self.pass_.statistic, weight.in_features)

    def add(self, statistic: Any, walk: BatchWalk, rows: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Adds the inputs of a batch, [tokens, width], to a statistic."""
        statistic.add(rows)

    def experts(self, key: Key, weights: list[Weight]) -> None:
        """Solves weights of routed experts, from a statistic for each expert."""
        parts = experts_of(weights)
        found: dict[str, dict[int | None, Solution]] = defaultdict(dict)
        kept: dict[str, torch.Tensor] = {}
        for statistics in self.observe_experts(key, sorted({expert for _, expert in parts}), weights[0].in_features):
            solved = self.solve([part for part in parts if part[1] in statistics], statistics)
            for (name, which), solution in solved.items():
                found[name][which] = solution
            for weight in weights:
                if weight.name in found and len(found[weight.name]) == (weight.experts or 1):
                    kept[weight.name] = self.keep(weight, found.pop(weight.name))
        # All at once: where experts are fused, one that is replaced loads them all. None of them reads what another writes.
        self.replace(kept)

    def observe_experts(self, key: Key, experts: list[int], width: int) -> Iterator[dict[int, Any]]:
        """The statistics of the inputs of routed experts, as many at a time as the memory budget allows."""
        at_once = max(1, STATISTICS_BYTES // self.pass_.statistic_bytes(width))
        for start in range(0, len(experts), at_once):
            some = experts[start : start + at_once]
            statistics = {expert: made_on(self.meta_model.device, self.pass_.statistic, width) for expert in some}
            for _, routed, valid in self.inputs(key):
                assert isinstance(routed, Routed)
                with self.spent("statistics"):
                    for expert, statistic in statistics.items():
                        x, tokens = routed.everywhere(expert) if self.pass_.route == "all" else routed.of(expert)
                        statistic.add(x if valid is None else x[valid[tokens]])
            for statistic in statistics.values():
                self.add_up(statistic)
            yield statistics

    def inputs(self, key: Key) -> Iterator[tuple[BatchWalk, torch.Tensor | Routed, torch.Tensor | None]]:
        """The inputs of a reader in each batch, and which of its tokens count (None: all).

        Batches pause inside the block, so that it runs once; those whose activations exceed the budget restart it later.
        """
        held = 0
        for walk in self.walks:
            try:
                x = self.until(walk, key)
            except LookupError:
                continue
            assert walk.call is not None
            read = x if isinstance(x, torch.Tensor) else x.rows
            held += walk.batch.held_bytes(read)
            yield walk, x, walk.batch.valid(read if isinstance(x, torch.Tensor) else None, walk.call)
            if held > HELD_BYTES:
                del x, read
                self.step_back(walk)

    def until(self, walk: BatchWalk, key: Key) -> torch.Tensor | Routed:
        """Runs a batch up to a reader; returns its input. Raises LookupError if the batch never reaches it."""
        with self.spent("forward"):
            return walk.until(key)

    def step_back(self, walk: BatchWalk) -> None:
        """Drops a batch's activations inside the block."""
        walk.step_back()

    def add_up(self, statistic: Any) -> None:
        """Sums a statistic over processes."""
        add_up(self.ctx, statistic)

    def solve(self, parts: list[Part], statistics: Mapping[Any, Any]) -> dict[tuple[str, int | None], Solution]:
        """Solutions by weight and expert. Processes share the work, and every one gets all results."""
        assert isinstance(self.pass_, LinearPass)
        loads = [0] * self.ctx.world_size
        mine: dict[tuple[str, int | None], Solution] = {}
        ready: dict[int | None, Any] = {}
        for stack in sorted(stacks_of(parts), key=lambda stack: -sum(weight.out_features for weight, _ in stack)):
            lightest = loads.index(min(loads))
            loads[lightest] += sum(weight.out_features for weight, _ in stack)
            if lightest != self.ctx.rank:
                continue
            expert = stack[0][1]
            with self.spent("factor"):
                if expert not in ready:
                    ready[expert] = self.prepare(stack[0][0], statistics[expert])
            with self.spent("solve"):
                tasks = [self.task(weight, which) for weight, which in stack]
                for (weight, which), solution in zip(stack, self.pass_.solve(tasks, ready[expert]), strict=True):
                    mine[weight.name, which] = solution
        if self.ctx.world_size == 1:
            return mine
        found: dict[tuple[str, int | None], Solution] = {}
        for rank in range(self.ctx.world_size):
            found.update(moved(self.ctx.broadcast(moved(mine, CPU), rank), self.meta_model.device))
        return found

    def prepare(self, weight: Weight, statistic: Any) -> Any:
        """What the pass prepares from a statistic. Raises InputError if an input was not finite."""
        try:
            return self.pass_.prepare(statistic)
        except ValueError as error:
            where = f"what '{weight.name}' reads"
            raise InputError(where, "finite activations", str(error), "try --dtype float32, or look at the source") from None

    def task(self, weight: Weight, expert: int | None) -> MatrixTask:
        """One matrix of a weight to solve; for a CompensatingPass with its codes."""
        after = self.step.after[weight.name]
        if self.dense_parent is None:
            grams = self.grams.read(weight, self.meta_model.device)
            return MatrixTask(self.peaks.of(weight), after, self.matrix(weight, expert), grams=grams)
        dense, q = self.dense_parent.read(weight), self.meta_model.dense_view.qtensor(weight.name)
        assert q is not None
        if weight.experts is not None:
            assert expert is not None
            dense, q = dense[expert], unstacked(q)[expert]
        return MatrixTask(weight, after, *moved((qtensor.along_inputs(weight, dense), q), self.meta_model.device))

    def matrix(self, weight: Weight, expert: int | None) -> torch.Tensor:
        """One matrix [out, in] of a weight, as it is stored, on the device."""
        stored = self.meta_model.dense_view.dense(weight.name)
        if weight.experts is not None:
            stored = stored[expert]
        return (stored.T if weight.transposed else stored).to(self.meta_model.device)

    def keep(self, weight: Weight, solutions: dict[int | None, Solution]) -> torch.Tensor:
        """Writes a solved weight and journals it; returns its dense value, which is to take its place in the block."""
        ordered = [solutions[expert] for expert in sorted(solutions, key=lambda e: e or 0)]
        value = joined(weight, [solution.value for solution in ordered])
        after = self.step.after[weight.name]
        if after.sparsity is not None:
            check_mask(weight, after.sparsity, value)
        facts = facts_of(ordered)
        notes = [s.note for s in ordered if s.note is not None]
        notes += watch(weight, value, facts["error"], lambda: qtensor.as_matrix(weight, self.meta_model.stored(weight.name)))
        with self.spent("write"):
            # Every process has every solution; one of them writes it.
            if self.ctx.rank == sum(weight.name.encode()) % self.ctx.world_size:
                digests = {name: self.writer.put(name, part) for name, part in qtensor.stored(weight, moved(value, CPU)).items()}
                self.writer.record(weight.name, digests, {**facts, **({"notes": notes} if notes else {})})
        return self.dense_of(weight, value)

    def dense_of(self, weight: Weight, value: Any) -> torch.Tensor:
        """The dense value of a solved weight, whose inputs are rounded from now on as they will be when the model runs."""
        before = self.step.before[weight.name].scheme
        if isinstance(value, qtensor.QTensor) and value.scheme.inputs and before is None:
            for path in self.meta_model.readers(weight.name):
                round_inputs(self.meta_model.module_at(path), InputRounding.of(value))
        return dense_of(weight, self.step.after[weight.name], value)

    def replace(self, weights: dict[str, torch.Tensor]) -> None:
        """Replaces weights in the block by their new values."""
        if weights:
            with self.spent("load"):
                self.meta_model.replace(weights)

    def read_back(self, weight: Weight) -> torch.Tensor:
        """The dense value of a weight that an earlier run has solved."""
        after = self.step.after[weight.name]
        parts = {spec.name: self.writer.read(spec) for spec in qtensor.specs(weight, after)}
        value = parts[weight.name] if after.scheme is None else qtensor.decode(weight, after, parts)
        return self.dense_of(weight, qtensor.as_matrix(weight, value) if isinstance(value, torch.Tensor) else value)


def read_alike(seen: list[tuple[Key, torch.Tensor | Routed]], path: str) -> list[list[Key]]:
    """Groups readers by the tensor that they read, in the order of a forward."""
    spaces: dict[Any, list[Key]] = {}
    keys: set[Key] = set()
    for key, x in seen:
        if key in keys:
            raise CoverageError(f"{path}: {key[0]}", "a weight that a forward uses once", "one that it uses again", "skip it")
        keys.add(key)
        # Views of one tensor in different shapes are the same input.
        same = (x.data_ptr(), x.numel(), x.shape[-1], x._version) if isinstance(x, torch.Tensor) else key
        spaces.setdefault(same, []).append(key)
    return list(spaces.values())
