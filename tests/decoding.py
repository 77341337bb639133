"""What tests of decoding share: a packed model, one without whole blocks, and what a model says token by token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from compress.layerwise.growing_cache import GrowingCache, argument
from compress.runtime.decode_chain import QuickBlock
from families import build
from support import run


def packed(name: str, tmp_path: Path, scheme: str = "w4a16g32") -> Path:
    run(build(name, tmp_path), tmp_path / "out", f"quantize.rtn(scheme={scheme}, ragged=channel) | pack(format=native)")
    return tmp_path / "out"


def by_modules(model: Any) -> Any:
    """A copy whose blocks call their modules."""
    found = copy.deepcopy(model)
    for block in found.modules():
        if isinstance(block, QuickBlock):
            block.__class__ = type(block).__mro__[2]
    return found


@torch.no_grad()
def said(model: Any, texts: int, mask: torch.Tensor | None = None, tokens: int = 6, kind: Any = GrowingCache) -> torch.Tensor:
    """Logits of tokens after a prompt, one at a time, the same tokens for every model, over a cache of that kind."""
    ids = torch.randint(3, 100, (texts, 9 + tokens), generator=torch.Generator().manual_seed(1))
    held, found = kind(config=model.config), []
    for start, end in ((0, 9), *((9 + i, 10 + i) for i in range(tokens))):
        given: Any = {argument(model): held, "attention_mask": None if mask is None else mask[:, :end]}
        found.append(model(input_ids=ids[:, start:end], **given).logits[:, -1])
    return torch.stack(found)
