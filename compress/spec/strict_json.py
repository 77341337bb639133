"""Strict JSON: each key once, whole characters, no deep nesting.

Readers disagree on an object that has a key twice, and half of a surrogate pair cannot be written back. Deep nesting would
exceed Python's recursion limit wherever the value is walked or printed.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Any

MOST_LEVELS = 100


def parse_json(data: bytes) -> Any:
    """Parses a JSON text in UTF-8. Raises ValueError."""
    text = data.decode("utf-8")
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep") from None
    level = [content]
    for _ in range(MOST_LEVELS):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [*chain.from_iterable(inner)]
    if level:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep")
    if "\\ud" in text.lower():
        json.dumps(content, ensure_ascii=False).encode()
    return content


def whole(text: str) -> bool:
    """Whether a text is free of halves of surrogate pairs, which no file can hold."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!a} occurs twice")
    return found
