"""Block trainer: gradient steps on what is trained of a block; its best iterate.

A step's loss is the sum over its tokens divided by their number, over all processes, so the way a step is divided affects
only rounding. The order of micro-batches is a function of the seed and the block, so that a block that is trained again
ends at the same bytes. After every epoch the loss is measured on what was held out; the block ends at the iterate with the
least, which may be the one before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from compress.context import Context
from compress.contract.block_training import BlockOptions
from compress.corpus.spec import shuffled
from compress.errors import InputError
from compress.executors.train.sign_sgd import SignSGD
from compress.freed_memory import large_blocks_kept
from compress.spec.weight_state import Weight

Pair = Callable[[int], AbstractContextManager[tuple[torch.Tensor, torch.Tensor]]]
"""The outputs of the block and of its twin for the tokens of a micro-batch that count, fp32 [tokens, width]."""
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TrainedBlock(Protocol):
    """A loaded block, and what is trained of it; BlockStudent trains what a weight's state leaves to train."""

    block: Any
    held: dict[str, torch.Tensor]
    """By a trained parameter's name: which of its entries may move."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""

    def rate(self, name: str, options: BlockOptions) -> float | None:
        """The peak learning rate of a trained parameter; None for one over the number of steps."""

    def settle(self, options: BlockOptions) -> None:
        """Takes trained parameters back into their range after a step."""

    def written(self, weight: Weight) -> dict[str, torch.Tensor]:
        """The tensors on disk of a trained weight, as it is now."""


class Outcome(NamedTuple):
    """What the training of a block has come to: losses per token."""

    start: float
    end: float
    changed: bool
    """Whether the block is not what it was."""
    tokens: int
    """Tokens trained on, each as often as it was."""


class Micros(NamedTuple):
    """Numbers of micro-batches: all that are trained on, those to compare iterates by, and the share of this process."""

    trained: list[int]
    compared: list[int]
    own: range


def divided(count: int, own: range, held_out: float) -> Micros:
    """Holds out every n-th of `count` micro-batches; if there are too few, iterates are compared by those trained on."""
    every = round(1 / held_out) if held_out else 0
    held = list(range(every - 1, count, every)) if 0 < every <= count and count > 1 else []
    trained = [number for number in range(count) if number not in set(held)]
    return Micros(trained, held or trained, own)


def steps_of(numbers: list[int], together: int, key: str) -> list[list[int]]:
    """The micro-batches of each step of an epoch: one of each of `together` ranges, so that processes have equal shares."""
    ranges = [numbers[len(numbers) * part // together : len(numbers) * (part + 1) // together] for part in range(together)]
    mixed = [[part[at] for at in shuffled(len(part), f"{key}/{number}")] for number, part in enumerate(ranges)]
    return [[part[step] for part in mixed if step < len(part)] for step in range(max(map(len, mixed)))]


class BlockTrainer:
    """The training of one block. `samples` are those of a micro-batch; `where` names the block."""

    def __init__(
        self, trained: TrainedBlock, pair: Pair, loss: Loss, micros: Micros, samples: int, options: BlockOptions, where: str,
        ctx: Context,
    ) -> None:  # fmt: skip
        self.trained, self.pair, self.loss, self.micros, self.options = trained, pair, loss, micros, options
        self.where, self.ctx, self.parameters = where, ctx, trained.trainable
        self.together = max(1, min(len(micros.trained), options.batch // samples))
        self.steps = options.epochs * len(steps_of(micros.trained, self.together, ""))
        # Tied weights share their parameters.
        distinct = {id(parameter): (name, parameter) for name, parameter in self.parameters.items()}.values()
        alone = 1 / max(1, self.steps)
        rates = {name: alone if (rate := trained.rate(name, options)) is None else rate for name, _ in distinct}
        groups = [{"params": [parameter], "peak": rates[name], "lr": 0.0} for name, parameter in distinct]
        self.distinct = [parameter for _, parameter in distinct]
        self.optimizer: torch.optim.Optimizer
        if options.optimizer == "sign":
            self.optimizer = SignSGD(groups)
        else:
            self.optimizer = torch.optim.AdamW(groups, betas=options.betas, weight_decay=0.0)
        self.reached = {name: torch.zeros(_rows(p), dtype=torch.bool) for name, p in self.parameters.items()}
        """By a trained parameter's name: which of its rows, or experts, a gradient has reached."""

    def train(self) -> Outcome:
        """Trains, and leaves the parameters at the iterate that is kept."""
        with large_blocks_kept():
            return self._train()

    def _train(self) -> Outcome:
        start = best = end = self.measure()
        kept: dict[str, torch.Tensor] | None = None
        done = tokens = 0
        for epoch in range(self.options.epochs):
            for numbers in steps_of(self.micros.trained, self.together, f"{self.ctx.seed}/{self.where}/{epoch}"):
                tokens += self.one_step(numbers, done)
                done += 1
            end = self.measure()
            if self.options.keep == "best" and end < best:
                best = end
                kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer.zero_grad()
        if self.options.keep == "last" or not done:
            return Outcome(start, end, bool(done), tokens)
        if kept is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(kept[name])
        return Outcome(start, best, kept is not None, tokens)

    @torch.no_grad()
    def measure(self) -> float:
        """The loss per token by which iterates are compared."""
        total = torch.zeros(2, dtype=torch.float64)
        for number in self.micros.compared:
            if number in self.micros.own:
                with self.pair(number) as (output, target):
                    total += torch.tensor([float(self.loss(output, target).double().sum()), len(output)], dtype=torch.float64)
        return self.per_token(total, "when measured")

    def per_token(self, total: torch.Tensor, when: str) -> float:
        """The quotient of sums (loss, tokens) over all processes. Raises InputError unless it is finite."""
        self.ctx.add_up(total)
        value = float(total[0]) / max(1.0, float(total[1]))
        if not math.isfinite(value):
            do = "lower lr or scale_lr, or try --dtype float32"
            raise InputError(f"{self.where}, {when}", "a finite loss", f"a loss of {value:g}", do)
        return value

    @torch.enable_grad()
    def one_step(self, numbers: list[int], done: int) -> int:
        """One step of the optimizer; returns its tokens."""
        self.optimizer.zero_grad()
        total = torch.zeros(2, dtype=torch.float64)
        for number in numbers:
            if number in self.micros.own:
                with self.pair(number) as (output, target):
                    loss = self.loss(output, target).sum()
                    if loss.requires_grad:
                        loss.backward()
                    total += torch.tensor([float(loss.detach()), len(output)], dtype=torch.float64)
        self.per_token(total, f"step {done + 1}")
        for parameter in self.distinct:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ctx.add_up(parameter.grad)
            parameter.grad /= max(1.0, float(total[1]))
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            if name in self.trained.held:
                parameter.grad.mul_(self.trained.held[name])
            self.reached[name] |= parameter.grad.reshape(_rows(parameter), -1).any(1).cpu()
        norm = float(nn.utils.clip_grad_norm_(self.distinct, self.options.clip or math.inf))
        if not math.isfinite(norm):
            do = "lower lr or scale_lr, or try --dtype float32"
            raise InputError(f"{self.where}, step {done + 1}", "a finite gradient", f"a gradient of norm {norm:g}", do)
        share = self.options.rate(done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        self.trained.settle(self.options)
        return int(total[1])


def _rows(parameter: torch.Tensor) -> int:
    return parameter.shape[0] if parameter.dim() else 1
