"""Stacks: the lists of blocks of a model: encoder, decoder, text and towers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

TOWERS = (("vision", re.compile(r"vision|visual|image")), ("audio", re.compile(r"audio")))
"""Words for towers, and what their paths have in them."""


def stacks(model: nn.Module) -> list[tuple[str, str, int]]:
    """(path, name, blocks) of every outermost list of blocks."""
    from torch import nn

    found: list[tuple[str, str, int]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer, _, _ in found):
            continue
        has_matrix = any(p.dim() >= 2 for child in module for p in child.parameters())
        if len(module) and has_matrix and all(list(child.children()) for child in module):
            found.append((path, "", len(module)))
    named: list[tuple[str, str, int]] = []
    towers = {path: next((word for word, regex in TOWERS if regex.search(path)), "") for path, _, _ in found}
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for path, _, length in found:
        if towers[path]:
            name = f"tower:{towers[path]}"
        elif "encoder" in path:
            name = "encoder"
        elif "decoder" in path or encoder_decoder:
            name = "decoder"
        else:
            name = "text" if any(towers.values()) else "decoder"
        taken = sum(other == name or other.startswith(f"{name}:") for _, other, _ in named)
        named.append((path, name if not taken else f"{name}:{taken + 1}", length))
    return named
