"""Byte size: parses sizes such as 500MB, 3.2GB, 4GiB."""

from __future__ import annotations

import re

from compress.errors import UsageError


def parse_size(text: str, where: str = "--shard-size") -> int:
    """Bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([kMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if match is None or float(match[1]) <= 0:
        raise UsageError(where, "a size such as 500MB or 5GB", f"'{text}'")
    base = 1024 if match[3] else 1000
    return max(1, int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " ")))
