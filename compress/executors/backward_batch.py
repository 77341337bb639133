"""Backward batch: one batch of a gradient sweep, and gradients between blocks.

Blocks run without a graph. Autograd records only what transformers' own code does between blocks (most often nothing). A
block's outputs enter that graph through a Gate, which in the backward pass stores their gradients for the block; the
inputs of later blocks are remembered as edges of the graph, which hold no values. So any later block may read what a block
returns: hidden states, an encoder's output, position biases. A tensor that a block passes on in another way, in a cache or a
dict among its arguments, would get no gradient, so such a block is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from compress.checkpoint.spill import Spill
from compress.errors import CoverageError, InputError
from compress.layerwise.batches import Batch
from compress.layerwise.hidden_state_offload import HiddenStateOffload
from compress.layerwise.meta_model import Block, MetaModel
from compress.layerwise.stepwise import Call, ForwardHooks, StepwiseForward

_LOGITS = 1 << 22
"""Logits whose gradient is computed at a time."""


class _Output(NamedTuple):
    """Placeholder for an argument that is an output of the block before."""

    number: int


class _Kept(NamedTuple):
    """Placeholder for an argument that is stored in the spill file."""

    key: Any


@dataclass
class _Stop:
    """One block on one batch: its flattened arguments, and the graph edges through which their gradients flow back."""

    spec: TreeSpec
    leaves: list[Any]
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    """Edges by an argument's index among the leaves."""


class _Gate(torch.autograd.Function):
    """Puts a block's output into the graph between blocks; its backward hands the gradient to `deliver`."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor, deliver: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.deliver = deliver
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        ctx.deliver(grads[0])
        return None, None, None


def drawn(p: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """A label for each row of probabilities, by a number from [0, 1) for each: the first whose sum so far is larger."""
    sums = p.cumsum(1)
    return torch.searchsorted(sums, chances * sums[:, -1:], right=True).clamp_(max=p.shape[1] - 1)[:, 0]


class BackwardBatch:
    """One batch: the blocks that it has gone through, and the gradients of their outputs."""

    def __init__(
        self, number: int, batch: Batch, meta_model: MetaModel, hooks: ForwardHooks, offload: HiddenStateOffload, spill: Spill
    ) -> None:
        self.number, self.batch = number, batch
        self.hooks, self.offload, self.spill = hooks, offload, spill
        self.forward = StepwiseForward(meta_model, batch.inputs)
        self.call: Call | None = None
        self.seed: int | None = None
        """Labels are drawn with it from what the model predicts; without it they are the next tokens."""
        self.stops: list[_Stop] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._outputs: list[Any] = []
        self._seen: dict[int, tuple[Any, _Kept]] = {}
        self._first: dict[tuple[Any, int], int] = {}
        self._used_first: dict[int, list[Any]] = {}

    def advance(self, *output: Any) -> None:
        """Goes on to the next block; `call` is None at the end."""
        self.call = self.forward.advance(*output)
        if self.call is not None:
            self.offload.park(self, self.call)

    def first_run(self, keep: bool) -> Any:
        """Runs the current block and returns its output, put into the graph; with `keep` all of its arguments are stored."""
        assert self.call is not None
        self.offload.fetch(self)
        leaves, spec = tree_flatten((self.call.args, self.call.kwargs))
        stop = _Stop(spec, [self._noted(leaf, place, keep) for place, leaf in enumerate(leaves)])
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                stop.edges[place] = edge = get_gradient_edge(leaf)
                self._first.setdefault((edge.node, edge.output_nr), len(self.stops))
        output = self._pure([leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
        step = len(self.stops)
        self.stops.append(stop)
        found, shape = tree_flatten(output)
        self._outputs = [self._gated(step, number, value) for number, value in enumerate(found)]
        return tree_unflatten(self._outputs, shape)

    def _pure(self, leaves: list[Any], spec: TreeSpec) -> Any:
        """The current block's output. Raises CoverageError for one that shares tensors through a cache or dict it is given."""
        assert self.call is not None
        block = self.call.block
        args, kwargs = tree_unflatten(leaves, spec)
        with torch.no_grad():
            output = self.hooks.visit(Call(block, args, kwargs)).finish()
        refuse_shared(block, leaves, tree_flatten((args, kwargs))[0])
        return output

    def _gated(self, step: int, number: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        key = ("grad", self.number, step, number)
        return _Gate.apply(self._anchor, value, lambda grad: self.spill.add(key, grad))  # type: ignore[no-untyped-call]

    def _noted(self, leaf: Any, place: int, keep: bool) -> Any:
        """The record of an argument: a placeholder for a tensor, or the argument itself."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not keep and (same := [n for n, output in enumerate(self._outputs) if output is leaf]):
            return _Output(same[0])
        known = self._seen.get(id(leaf))
        if known is None or known[0]() is not leaf:
            self._seen[id(leaf)] = known = (ref(leaf), self._set_aside(len(self.stops), place, leaf))
        return known[1]

    def _set_aside(self, step: int, place: int, tensor: torch.Tensor) -> _Kept:
        """Puts an argument in the spill file. The backward pass drops it after `step`, the first block that uses it."""
        key = ("input", self.number, step, place)
        self.spill.put(key, tensor)
        self._used_first.setdefault(step, []).append(key)
        return _Kept(key)

    def finish(self, weight: float) -> float:
        """Sends the gradient of the loss, `weight` for each scored token, into the graph. Returns the sum of the losses."""
        logits, ids = getattr(self.forward.output, "logits", None), self.batch.ids
        self.forward.output = None
        self._outputs, self._seen = [], {}
        if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != ids.shape:
            got = f"{list(logits.shape)}" if isinstance(logits, torch.Tensor) else "none"
            do = "use a pass that needs no gradients"
            raise InputError("the model", f"logits for every token, {list(ids.shape)}", got, do)
        places = self.batch.scored.flatten().nonzero()[:, 0]
        labels = ids.roll(-1, dims=1).flatten()[places]
        # The gradient overwrites the logits, the largest tensor of all, which are not needed any more.
        grad, loss = logits.detach(), 0.0
        flat = grad.flatten(0, 1)
        step = max(1, _LOGITS // flat.shape[-1])
        if self.seed is not None:
            # The same on every device.
            chances = torch.rand(len(places), 1, generator=torch.Generator().manual_seed(self.seed)).to(grad.device).split(step)
        for number, (rows, following) in enumerate(zip(places.split(step), labels.split(step), strict=True)):
            log_p = torch.log_softmax(flat[rows].float(), dim=-1)
            loss -= float(log_p.gather(1, following[:, None]).sum())
            p = log_p.exp_()
            wanted = following if self.seed is None else drawn(p, chances[number])
            p[torch.arange(len(rows), device=p.device), wanted] -= 1
            flat[rows] = p.mul_(weight).to(grad.dtype)
        flat[~self.batch.scored.flatten()] = 0
        if logits.requires_grad:
            torch.autograd.backward([logits], [grad], retain_graph=True)
        return loss

    def run_again(self, block: Block, step: int, leaves: list[Any]) -> list[Any]:
        """Runs a block again with these arguments; its outputs, flattened."""
        args, kwargs = tree_unflatten(leaves, self.stops[step].spec)
        return list(tree_flatten(self.hooks.visit(Call(block, args, kwargs)).finish())[0])

    def arguments(self, step: int) -> list[Any]:
        """The arguments of the block at `step`, flattened."""
        return [self.spill.get(leaf.key) if isinstance(leaf, _Kept) else leaf for leaf in self.stops[step].leaves]

    def carry(self, block: Block, step: int) -> None:
        """Runs the block at `step` again, to restore the arguments of the next one."""
        outputs, after = self.run_again(block, step, self.arguments(step)), self.stops[step + 1]
        after.leaves = [
            self._set_aside(step + 1, place, outputs[leaf.number]) if isinstance(leaf, _Output) else leaf
            for place, leaf in enumerate(after.leaves)
        ]

    def go_back(self, block: Block, step: int) -> None:
        """Adds this batch's gradients to those of the block's weights, and stores the gradients of its inputs."""
        stop, leaves = self.stops[step], self.arguments(step)
        for key in self._used_first.pop(step, ()):
            self.spill.drop(key)
        self._flush(step + 1)
        for place in stop.edges:
            leaves[place] = leaves[place].detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.run_again(block, step, leaves)
        ends, grads = [], []
        for number, output in enumerate(outputs):
            key = ("grad", self.number, step, number)
            if key in self.spill:
                if output.requires_grad:
                    ends.append(output)
                    grads.append(self.spill.get(key))
                self.spill.drop(key)
        del outputs
        torch.autograd.backward(ends, grads)
        for place, edge in stop.edges.items():
            if leaves[place].grad is not None:
                self.spill.add(("edge", self.number, edge.node, edge.output_nr), leaves[place].grad)

    def _flush(self, step: int) -> None:
        """Sends gradients into the graph at edges first read at `step`, once all blocks that read them have added theirs."""
        edges = [edge for edge, first in self._first.items() if first == step and ("edge", self.number, *edge) in self.spill]
        grads = [self.spill.get(("edge", self.number, *edge)) for edge in edges]
        for edge in edges:
            self.spill.drop(("edge", self.number, *edge))
        # The graph is kept, because edges first read at another step may share parts of it.
        torch.autograd.backward([GradientEdge(*edge) for edge in edges], grads, retain_graph=True)

    @property
    def state_bytes(self) -> int:
        """Bytes of the largest tensor among the current block's arguments: the hidden states."""
        assert self.call is not None
        given = tree_flatten((self.call.args, self.call.kwargs))[0]
        return max((t.nbytes for t in given if isinstance(t, torch.Tensor) and t.is_floating_point()), default=0)

    def leave(self) -> None:
        """Sends gradients to what comes before the first block, and ends the forward."""
        self._flush(0)
        self.forward.leave()


def refuse_shared(block: Block, before: list[Any], after: list[Any]) -> None:
    """Raises CoverageError for a block that shares tensors through its flattened arguments, a cache or a dict among them."""
    names = [type(leaf).__name__ for leaf in after if not isinstance(leaf, torch.Tensor) and _holds(leaf)]
    if names or len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
        got = f"one that shares tensors with other blocks by way of a {names[0] if names else 'dict or list'}"
        do = "use a pass that needs no gradients"
        raise CoverageError(block.path, "a block that hands on what it returns, and nothing else", got, do)


def _holds(value: Any, depth: int = 3) -> bool:
    """Whether an object holds tensors; those of a module are its weights and do not count."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, torch.nn.Module):
        return False
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return any(_holds(part, depth - 1) for part in (*inside, *getattr(value, "__dict__", {}).values()))
