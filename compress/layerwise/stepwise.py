"""Stepwise: a forward of one batch, paused at blocks and inputs of weights.

transformers' own forward runs as a whole in a greenlet, so everything between blocks (masks, rotary positions, encoder
to decoder, shared position biases) is its own code, whatever the family. At a block it pauses and returns the block's
arguments; the caller runs the block, in another greenlet (a Visit), and passes the output back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from compress.architecture.experts import Routed
from compress.layerwise.meta_model import Block, MetaModel

ROUNDING = "_input_rounding"
"""The attribute of a module that rounds its inputs."""
Key = tuple[str, str]
"""A reader of activations: (path of a module, which of its inputs; empty for a linear)."""


class Call(NamedTuple):
    """A block with the arguments that the model calls it with."""

    block: Block
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class StepwiseForward(greenlet):  # type: ignore[misc]
    """The forward of one batch, paused at each block. `inputs` are the model's keyword arguments."""

    def __init__(self, meta_model: MetaModel, inputs: dict[str, torch.Tensor]) -> None:
        super().__init__(lambda: meta_model.module(**inputs))
        self.inputs = inputs
        self.output: Any = None

    def advance(self, *output: Any) -> Call | None:
        """Passes the current block's output back and runs to the next block; None at the end, when `self.output` is set."""
        reached = self.switch(*output)
        if isinstance(reached, Call):
            return reached
        self.output = reached
        return None

    def leave(self) -> None:
        """Aborts the forward."""
        if not self.dead:
            self.throw(GreenletExit)


class ForwardHooks:
    """Inside this context a StepwiseForward pauses at the meta model's blocks, and a Visit at its readers."""

    def __init__(self, meta_model: MetaModel) -> None:
        self.meta_model = meta_model
        self._forwards: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> ForwardHooks:
        for block in self.meta_model.blocks:
            module = self.meta_model.module_at(block.path)
            self._forwards[block.path] = module.forward
            module.forward = _paused(block, module.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for block in self.meta_model.blocks:
            vars(self.meta_model.module_at(block.path)).pop("forward", None)

    def visit(self, call: Call) -> Visit:
        """The forward of one block on one batch, not started yet."""
        return Visit(self._forwards[call.block.path], call)

    def watch(self, readers: dict[str, bool]) -> Callable[[], None]:
        """Makes modules report their inputs to the Visit that runs them; True for experts. Returns a function to undo it."""
        undo: list[Callable[[], None]] = []
        for path, routed in readers.items():
            module: Any = self.meta_model.module_at(path)
            if routed:
                module.listener = _listener(path)
                undo.append(partial(delattr, module, "listener"))
            else:
                hook = module.register_forward_pre_hook(_teller(path), with_kwargs=True)
                undo.append(hook.remove)

        def forget() -> None:
            for end in undo:
                end()

        return forget

    def keep(self, paths: set[str]) -> Callable[[], None]:
        """Makes Visits keep what these modules have read, for `Visit.kept`. Returns a function to undo it."""
        hooks = [self.meta_model.module_at(path).register_forward_pre_hook(_keeper(path)) for path in sorted(paths)]

        def forget() -> None:
            for hook in hooks:
                hook.remove()

        return forget


def _paused(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
    def pause(*args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if isinstance(current, StepwiseForward):
            return current.parent.switch(Call(block, args, kwargs))
        return forward(*args, **kwargs)

    return pause


def _listener(path: str) -> Callable[[str, Routed], None]:
    return lambda which, inputs: _tell((path, which), inputs)


def _teller(path: str) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = vars(module).get(ROUNDING)
        _tell((path, ""), args[0] if args else next(iter(kwargs.values())))
        # What the module has been told to round with during the pause; a call knows the hooks of its beginning alone.
        after = vars(module).get(ROUNDING)
        return ((after(args[0]), *args[1:]), kwargs) if args and after is not None and after is not before else None

    return hook


def _keeper(path: str) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        current = getcurrent()
        if isinstance(current, _Run):
            current.kept[path] = args[0]

    return hook


def _tell(key: Key, inputs: torch.Tensor | Routed) -> None:
    current = getcurrent()
    if isinstance(current, _Run):
        current.reached(key, inputs)


class Visit:
    """A block's forward on one batch. It pauses at a given reader; after `drop` it starts again when needed."""

    def __init__(self, forward: Callable[..., Any], call: Call) -> None:
        self._forward, self._call = forward, call
        self._run: _Run | None = None

    def until(self, key: Key) -> torch.Tensor | Routed:
        """Runs up to the reader `key`; returns its input. Raises LookupError if this batch never reaches it."""
        run = self._run = self._run or _Run(self._forward, self._call)
        if run.at != key:
            run.goal = key
            run.switch()
        if run.inputs is None:
            self._run = None
            raise LookupError(key)
        return run.inputs

    def kept(self, path: str) -> torch.Tensor:
        """What a module read before the place where the run has paused; its input is kept."""
        assert self._run is not None
        return self._run.kept[path]

    def finish(self) -> Any:
        """The block's output."""
        run = self._run or _Run(self._forward, self._call)
        run.goal = None
        self._run = None
        return run.switch()

    def drop(self) -> None:
        """Aborts the run, and drops the activations that it holds."""
        if self._run is not None:
            self._run.throw(GreenletExit)
            self._run = None

    def survey(self) -> list[tuple[Key, torch.Tensor | Routed]]:
        """Runs the block once without pausing; all readers with their inputs, in order."""
        run = _Run(self._forward, self._call)
        run.seen = []
        run.switch()
        return run.seen


class _Run(greenlet):  # type: ignore[misc]
    """The greenlet of a Visit."""

    def __init__(self, forward: Callable[..., Any], call: Call) -> None:
        super().__init__(lambda: forward(*call.args, **call.kwargs))
        self.goal: Key | None = None
        self.at: Key | None = None
        self.inputs: torch.Tensor | Routed | None = None
        self.seen: list[tuple[Key, Any]] | None = None
        self.kept: dict[str, torch.Tensor] = {}

    def reached(self, key: Key, inputs: torch.Tensor | Routed) -> None:
        """Called by the watched modules that this run reaches."""
        if self.seen is not None:
            self.seen.append((key, inputs))
        elif key == self.goal:
            self.at, self.inputs = key, inputs
            self.parent.switch()
            self.at = self.inputs = None
