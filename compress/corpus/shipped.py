"""Shipped: the mixed text that calibrates where no data is named."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

SAMPLES, LENGTH = 64, 512
"""Samples and length by default: about two thirds of the text."""


def path() -> Path:
    """Where it lies."""
    return Path(__file__).parent / "text" / "mixed.jsonl"


@lru_cache(maxsize=1)
def told() -> str:
    """A line for people: which text this is, and how to give another."""
    content = path().read_bytes()
    return (
        f"the mixed text that ships with compress, {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}; "
        "texts like those that the model is for are better: calibrate(data=TEXTS.jsonl)"
    )
