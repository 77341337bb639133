"""Residual stream: which linears of a block add their outputs to it.

It is found by numbers, so no family has code of its own: a linear adds to the stream if a module has read h before it, and what a
later module reads, or the block returns, is h plus the linear's output, to the last bit. Where outputs are normed or scaled
before they are added, or added together with others, there is no such linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from compress.layerwise.stepwise import Call, ForwardHooks


def adders(hooks: ForwardHooks, call: Call, linears: set[str]) -> dict[str, str]:
    """By the path of a linear that adds to the stream, the path of a module that has read the stream until then."""
    block, meta_model = call.block.path, hooks.meta_model
    read: list[tuple[str, torch.Tensor]] = []
    """What modules have read, in order, and at the end what the block returns."""
    added: list[tuple[str, torch.Tensor, int]] = []
    """(linear, its output, how many of `read` came before it)."""

    def before(path: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                # Cloned, for the stream may be added to in place.
                read.append((path, args[0].clone()))

        return hook

    def after(path: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor):
                added.append((path, output.clone(), len(read)))

        return hook

    made = []
    for name, module in meta_model.module_at(block).named_modules():
        if path := name and f"{block}.{name}":
            made.append(module.register_forward_pre_hook(before(path)))
            if path in linears:
                made.append(module.register_forward_hook(after(path)))
    output = hooks.visit(call).finish()
    for hook in made:
        hook.remove()
    read.append(("", next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))))
    found: dict[str, str] = {}
    for path, y, count in added:
        streams = [(reader, h) for reader, h in read[:count] if h.shape == y.shape]
        later = [x for _, x in read[count:] if x.shape == y.shape]
        if (stream := next((r for r, h in streams if any(torch.equal(x, h + y) for x in later)), None)) is not None:
            found[path] = stream
    return found
