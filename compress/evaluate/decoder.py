"""Decoder: greedy decoding by one model: eager, by a CUDA graph, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from transformers import StaticCache

from compress.errors import CompressError
from compress.layerwise.growing_cache import GrowingCache, argument
from compress.runtime.compiled_step import CHECKED, CompiledStep

_WARM = 3
"""Warm-up steps before a graph is captured."""


class Decoder:
    """Greedy decoding by one model, of prompts of one shape.

    With `static` the cache has a fixed size, which a CUDA graph and compiled code need.
    """

    compile_seconds: float | None = None

    def __init__(self, model: Any, ids: torch.Tensor, new: int, static: bool) -> None:
        self.model, self.ids = model, ids.to(model.device)
        most = ids.shape[1] + new + 2 * _WARM
        self.cache: Any = StaticCache(config=model.config, max_cache_len=most) if static else None
        self._takes = argument(model)
        self._dynamic = partial(GrowingCache, model.config)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self.token = torch.zeros(len(ids), 1, dtype=torch.long, device=model.device)
        self.static, self.how, self.advance = static, "eager", self.step

    def prompt(self) -> None:
        """Runs the prompts from an empty cache; `token` [batch, 1] is then the next token of each."""
        if self.static:
            self.cache.reset()
        else:
            self.cache = self._dynamic()
        self.token.copy_(self._next(self.ids, self.model))

    def step(self) -> None:
        """Replaces `token` by the next one."""
        self.token.copy_(self._next(self.token, self.model))

    def _next(self, ids: torch.Tensor, run: Callable[..., Any]) -> torch.Tensor:
        found = run(input_ids=ids, use_cache=True, **{self._takes: self.cache}, **self._last)
        best: torch.Tensor = found.logits[:, -1:].argmax(-1)
        return best

    def capture(self) -> None:
        """Makes `advance` replay a CUDA graph; if none can be captured, it stays eager and `how` says why."""
        self.prompt()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except (RuntimeError, CompressError) as error:
            self.how = f"eager, for no CUDA graph could be captured: {str(error).strip().splitlines()[0]}"
            return
        if self._tokens(graph.replay) != self._tokens(self.step):
            self.how = "eager, for a CUDA graph generates other tokens"
            return
        self.advance, self.how = graph.replay, "graph"

    def compile(self) -> None:
        """Makes `advance` a compiled step; if that fails or generates other tokens, it stays eager and `how` says why."""
        run = CompiledStep(self.model)

        def step() -> None:
            self.token.copy_(self._next(self.token, run))

        self.prompt()
        try:
            for _ in range(CHECKED):
                step()
            self.advance, self.how = step, "compiled"
        except CompressError as error:
            self.static, self.how = False, f"eager, for compiling gave: {error.problems[0].got}"
        self.compile_seconds = run.seconds

    def _tokens(self, advance: Callable[[], None]) -> list[list[int]]:
        """The first few tokens after each prompt, to compare graph and eager."""
        self.prompt()
        found = []
        for _ in range(_WARM):
            advance()
            found.append(self.token.flatten().tolist())
        return found
