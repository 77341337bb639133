"""Smooth: runs a smoothing pass over a checkpoint: rescales writers and readers.

A sweep that does not replace weights in the model, since smoothing keeps its function. For every block the activations of its
spaces are observed, the pass computes the numbers, and each weight is written once, with its rows and columns rescaled in fp32.
A norm is divided and rounded to its stored dtype first; its readers are multiplied by the divisor that results from that, so
that the rounding of the norm cancels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from compress.architecture.experts import MIDDLE
from compress.architecture.families import Space
from compress.checkpoint.reader import torch_dtype
from compress.contract.smoothing_pass import Matrix, SmoothingPass
from compress.errors import CoverageError, InputError
from compress.executors.step_run import StepRun
from compress.executors.sweep import Sweep, read_alike, sweep_by
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.stepwise import Key
from compress.numerics.qtensor import as_matrix
from compress.spec.weight_state import Weight


def smooth(run: StepRun) -> dict[str, float]:
    """Writes every weight that is not journaled yet. Returns the seconds of each kind of work."""
    return sweep_by(run, SmoothingSweep)


class SmoothingSweep(Sweep):
    """Rescales the spaces of every block."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert isinstance(self.pass_, SmoothingPass)
        self.smoothing, model = self.pass_, self.meta_model.model
        found = self.smoothing.layout(model.weights, model.family, self.meta_model.dense_view.checkpoint.config)
        self.layout = found.within(set(self.step.transformed))

    def block(self, path: str, weights: list[Weight], probe: BatchWalk) -> int:
        if all(self.writer.is_done(weight.name) for weight in weights):
            return len(weights)
        self.rows: dict[str, torch.Tensor] = {}
        self.columns: dict[str, torch.Tensor] = {}
        self.norms: dict[str, torch.Tensor] = {}
        self.happened: dict[str, list[list[str]]] = defaultdict(list)
        spaces: dict[Key, list[Space]] = defaultdict(list)
        for space in self.layout.spaces:
            if space.block == path:
                spaces[_key(space)].append(space)
        inside = [weight for weight in self.meta_model.model.weights if weight.module.startswith(f"{path}.")]
        readers = (weight for weight in inside if weight.kind in ("linear", "router") and weight.attribute == "weight")
        forget = self.hooks.watch({weight.module: False for weight in readers} | {key[0]: True for key in spaces if key[1]})
        with self.spent("forward"):
            alike = read_alike(probe.survey(), path)
        for group in alike:
            for space in [space for key in group if not key[1] for space in spaces.pop(key, ())]:
                _check(space, group)
                self.rescale(space, self.observe(group[0], space.readers[0]))
            if group[0] in spaces:
                self.experts_of(group[0], {space.expert: space for space in spaces.pop(group[0])})
        forget()
        if spaces:
            missed = next(iter(spaces.values()))[0].readers[0].name
            raise CoverageError(missed, "weights that a forward of their block reads", "nothing observed", "skip them")
        for weight in weights:
            self.put(weight)
        return 0

    def experts_of(self, key: Key, spaces: dict[int | None, Space]) -> None:
        """Rescales the spaces inside routed experts, each expert by itself."""
        width = next(iter(spaces.values())).readers[0].in_features
        for statistics in self.observe_experts(key, sorted(e for e in spaces if e is not None), width):
            for expert, statistic in statistics.items():
                space = spaces[expert]
                if statistic.tokens:
                    self.rescale(space, statistic)
                else:
                    self.happened[space.readers[0].name].append(["unrouted", "no calibration token at all: not smoothed"])

    def rescale(self, space: Space, statistic: Any) -> None:
        """Computes a space's numbers, and records them for the rows and columns of its weights."""
        with self.spent("factor"):
            prepared = self.prepare(space.readers[0], statistic)
        with self.spent("solve"):
            s = self.smoothing.balance(space, self.matrices(space), prepared)
        if s is None:
            return
        rows = torch.ones(space.first_row + space.width, device=s.device)
        rows[space.first_row :] = s
        if space.how == "rows":
            self.times(self.rows, space.writer, rows)
        else:
            rows = s = self.divided(space, s)
        if space.bias is not None:
            self.times(self.rows, space.bias, rows)
        for reader in space.readers:
            self.times(self.columns, reader, space.spread(s))

    def divided(self, space: Space, s: torch.Tensor) -> torch.Tensor:
        """Divides a norm by `s`; returns the divisor that results after its weight is rounded to the stored dtype."""
        stored = self.meta_model.stored(space.writer.name)
        plus = 1.0 if space.how == "norm+1" else 0.0
        before = stored.float() + plus
        new = (before / s - plus).to(stored.dtype)
        really = torch.where(before == 0, s, before / (new.float() + plus))
        # A weight that would become zero or infinite is not changed.
        lost = ~(torch.isfinite(really) & (really > 0))
        self.norms[space.writer.name] = torch.where(lost, stored, new)
        return torch.where(lost, 1.0, really)

    def matrices(self, space: Space) -> Iterator[Matrix]:
        """The targeted matrices that read a space."""
        for reader in space.readers:
            if reader.name in self.layout.wanted:
                value = self.current(reader)
                for matrix in value if reader.experts is not None else (value,):
                    yield Matrix(reader, matrix)

    @staticmethod
    def times(factors: dict[str, torch.Tensor], weight: Weight, by: torch.Tensor) -> None:
        """Multiplies the recorded factor of a weight by another one."""
        factors[weight.name] = factors[weight.name] * by if weight.name in factors else by

    def current(self, weight: Weight) -> torch.Tensor:
        """A weight [experts?, out, in], or a bias [out], in fp32, with the factors recorded so far."""
        value = _oriented(weight, self.meta_model.stored(weight.name)).float()
        if (rows := self.rows.get(weight.name)) is not None:
            value = value / (rows if value.dim() == 1 else rows[:, None])
        return value * self.columns[weight.name] if weight.name in self.columns else value

    def put(self, weight: Weight) -> None:
        """Writes the rescaled weight, and journals it."""
        with self.spent("write"):
            if self.ctx.rank != sum(weight.name.encode()) % self.ctx.world_size:
                return
            value = self.norms.get(weight.name)
            if value is None:
                value = _oriented(weight, self.current(weight)).to(torch_dtype(weight.dtype))
            if not bool(torch.isfinite(value).all()):
                do = "skip it, or start from a checkpoint in bfloat16"
                raise InputError(f"'{weight.name}', rescaled", f"numbers that {weight.dtype} can hold", "an overflow", do)
            facts = {"notes": self.happened[weight.name]} if weight.name in self.happened else {}
            self.writer.record(weight.name, {weight.name: self.writer.put(weight.name, value.cpu())}, facts)


def _oriented(weight: Weight, value: torch.Tensor) -> torch.Tensor:
    """A stored tensor as [out, in], or back; the function is its own inverse."""
    return value.T if weight.transposed and weight.experts is None else as_matrix(weight, value)


def _key(space: Space) -> Key:
    """The reader at which a space is observed."""
    if space.expert is not None:
        return space.readers[0].module, MIDDLE
    return next(reader.module for reader in space.readers if reader.kind != "expert"), ""


def _check(space: Space, group: list[Key]) -> None:
    """Raises CoverageError unless the observed readers of a space are those of the table."""
    named = {reader.module for reader in space.readers if reader.kind != "expert"}
    if wrong := sorted(named ^ {path for path, which in group if not which}):
        expected = f"{space.name} to be read by {', '.join(sorted(named))}, and by nothing else"
        got = "that it reads something else" if wrong[0] in named else "another reader of it"
        raise CoverageError(wrong[0], expected, got, "quantize without smoothing")
