"""Our own runtime as a reader: the packed weights, run by their backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [samples, length] -> logits [samples, length, vocabulary]."""
    from compress.runtime import artifact as native

    model = native.load(artifact, str(dtype).removeprefix("torch."))
    notes.append(", ".join(f"{count} weights by the backend {name}" for name, count in native.backends(model).items()))
    return lambda ids: model(input_ids=ids, use_cache=False).logits
