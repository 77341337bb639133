"""Batch walk: takes one batch of a sweep through the model, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compress.architecture.experts import Routed
from compress.layerwise.batches import Batch
from compress.layerwise.hidden_state_offload import HiddenStateOffload
from compress.layerwise.stepwise import Call, ForwardHooks, Key, StepwiseForward, Visit


class BatchWalk:
    """Goes from block to block with `go_on`; inside a block `until` runs it up to a reader, where it pauses."""

    def __init__(self, batch: Batch, hooks: ForwardHooks, offload: HiddenStateOffload) -> None:
        self.batch, self._hooks, self._offload = batch, hooks, offload
        self._forward = StepwiseForward(hooks.meta_model, batch.inputs)
        self.call: Call | None = None
        self._visit: Visit | None = None

    def set_out(self) -> None:
        """Goes to the first block."""
        self._arrive(self._forward.advance())

    def go_on(self, seen: Callable[[Call, Any], None] | None = None, last: bool = False) -> None:
        """Finishes the block and goes to the next one; `call` is None at the end of the model.

        `seen` gets the block's call and output. After the `last` block that is of interest the forward is aborted.
        """
        output = self._inside().finish()
        if seen is not None:
            assert self.call is not None
            seen(self.call, output)
        if last:
            self.leave()
            return
        self.hand_on(output)

    def hand_on(self, output: Any) -> None:
        """Goes to the next block with this output of the block."""
        # Frees the old hidden states.
        self.call = self._visit = None
        self._arrive(self._forward.advance(output))

    def until(self, key: Key) -> torch.Tensor | Routed:
        """Runs up to the reader `key`; returns its input. Raises LookupError if this batch never reaches it."""
        return self._inside().until(key)

    def kept(self, path: str) -> torch.Tensor:
        """What a module of the block read before the pause; its input is kept."""
        return self._inside().kept(path)

    def survey(self) -> list[tuple[Key, torch.Tensor | Routed]]:
        """All readers of this block with their inputs, in order."""
        return self._inside().survey()

    def arguments(self) -> Call:
        """The call of this block, its arguments in memory until `step_back` or `go_on`."""
        self._inside()
        assert self.call is not None
        return self.call

    def step_back(self) -> None:
        """Drops the activations inside the block; when it is needed again, the block is run from its start."""
        if self._visit is not None and self.call is not None:
            self._visit.drop()
            self._offload.park(self, self.call, unchanged=True)

    def leave(self) -> None:
        """Aborts the forward."""
        if self._visit is not None:
            self._visit.drop()
        self.call = self._visit = None
        self._forward.leave()

    def _arrive(self, call: Call | None) -> None:
        self.call = call
        if call is not None:
            self._visit = self._hooks.visit(call)
            self._offload.park(self, call)

    def _inside(self) -> Visit:
        assert self._visit is not None
        self._offload.fetch(self)
        return self._visit
