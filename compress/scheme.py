"""Scheme: what a weight's numbers mean, and its text form.

Grammar (parses and prints back to the same text):

    scheme  = "w" bits "a16" [ "g" group ] [ "-asym" ]
    bits    = 2 | 3 | 4 | 8            integer codes
    group   = columns that share one scale; without it one scale per output channel

`w4a16g128` is symmetric 4-bit with groups of 128 along the input dimension, `w3a16g64-asym`
has an integer zero point per group, `w8a16` is per channel. Activations stay in 16 bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from compress.errors import UsageError
from compress.textform import TextForm

_GRAMMAR = re.compile(r"w(?P<bits>\d{1,3})a(?P<act>\d{1,3})(?:g(?P<group>\d{1,7}))?(?P<asym>-asym)?", re.ASCII)
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Scheme(TextForm):
    """Integer weight codes: `bits` per code, `group` columns per scale (None: one per output channel)."""

    bits: int
    group: int | None = None
    symmetric: bool = True

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Reads the text form. Raises UsageError that names the part which is wrong."""
        if isinstance(text, Scheme):
            return text
        expected = "a scheme such as w4a16g128, w3a16g64-asym or w8a16"
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UsageError(f"scheme '{text}'", expected, "text outside the grammar w<bits>a16[g<group>][-asym]")
        bits, group = int(match["bits"]), match["group"]
        if bits not in BITS:
            raise UsageError(f"scheme '{text}'", f"bits among {', '.join(map(str, BITS))}", f"{bits} bits")
        if match["act"] != "16":
            raise UsageError(f"scheme '{text}'", "a16 (activations in 16 bits)", f"a{match['act']}")
        if group is not None and int(group) < 8:
            raise UsageError(f"scheme '{text}'", "a group of at least 8 columns", f"g{group}")
        return cls(bits, int(group) if group else None, match["asym"] is None)

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group else ""
        return f"w{self.bits}a16{group}{'' if self.symmetric else '-asym'}"

    @property
    def levels(self) -> int:
        """How many codes there are: codes are stored unsigned, 0 .. levels - 1."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The code that means zero in a symmetric scheme."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Scales per output row for a weight with `columns` inputs (a ragged last group counts)."""
        return 1 if self.group is None else -(-columns // self.group)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^w(2|3|4|8)a16(g[0-9]+)?(-asym)?$", "examples": ["w4a16g128"]}
