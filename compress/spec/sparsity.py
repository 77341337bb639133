"""Sparsity: which share, or which pattern, of a weight's entries are zero.

Grammar (parses and prints back to the same text):

    sparsity = fraction | kept ":" of
    fraction = 0 < number < 1        this share of the entries is zero: `0.5`
    kept:of  = whole numbers         at most `kept` of each aligned `of` along the inputs are not zero: `2:4`, `4:8`

`2:4` is NVIDIA's: two of four are kept. (Papers that count the pruned ones write the same text for 2:4 and 4:8.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from compress.errors import UsageError
from compress.spec.text_form import TextForm

_GRAMMAR = re.compile(r"(?P<kept>\d{1,3}):(?P<of>\d{1,3})|(?P<fraction>0?\.\d+)", re.ASCII)


def _digits(fraction: float) -> str:
    """A number in the grammar's form, without an exponent, that reads back to the same one."""
    return f"{Decimal(repr(fraction)):f}"


@dataclass(frozen=True)
class Sparsity(TextForm):
    """`fraction` of zeros, or `kept` of every `of` inputs; the other form's fields are None."""

    fraction: float | None = None
    kept: int | None = None
    of: int | None = None

    @classmethod
    def parse(cls, text: str | float | Sparsity) -> Sparsity:
        """Reads the text form. Raises UsageError."""
        if isinstance(text, Sparsity):
            return text
        match = _GRAMMAR.fullmatch(_digits(text) if isinstance(text, float) else str(text))
        if match and match["fraction"] and 0 < float(match["fraction"]) < 1:
            return cls(fraction=float(match["fraction"]))
        if match and match["of"] and 0 < int(match["kept"]) < int(match["of"]) <= 64:
            return cls(kept=int(match["kept"]), of=int(match["of"]))
        expected = "a share of zeros between 0 and 1 such as 0.5, or kept:of such as 2:4"
        raise UsageError(f"sparsity '{str(text)[:40]}'", expected, "neither")

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}" if self.fraction is None else _digits(self.fraction)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "string", "pattern": r"^(0?\.[0-9]+|[0-9]+:[0-9]+)$"}, {"type": "number"}],
            "examples": ["2:4"],
        }
