"""Corrections: outliers, kept columns and low-rank factors, next to codes.

Grammar (parses and prints back to the same text):

    outliers = 0 < number < 1             this share of a matrix's entries is kept unrounded, instead of its codes: `0.005`
    columns  = number [ "-int8" ]         as many inputs are not rounded with the others, and their columns are kept instead
                                          of codes: in the weight's dtype, or both as int8: `256`, `256-int8`
    lowrank  = "r" rank [ "-int8" ]       the product of two factors is added to all entries; bf16, or int8: `r8-int8`
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from compress.errors import UsageError
from compress.spec.text_form import TextForm

UNIT = 16
"""Kept columns are as many as a multiple of this, the width of a product on tensor cores."""
SHORT = 1 << 16
"""Up to this many columns an outlier's column takes two bytes."""


@dataclass(frozen=True)
class Outliers(TextForm):
    """`share` of the entries of each matrix, the largest ones."""

    share: float

    @classmethod
    def parse(cls, text: str | float | Outliers) -> Outliers:
        """Reads the text form. Raises UsageError."""
        if isinstance(text, Outliers):
            return text
        if re.fullmatch(r"0?\.\d+|\d(\.\d+)?e-\d+", str(text)) and 0 < float(text) < 1:
            return cls(float(text))
        raise UsageError(f"outliers '{text}'", "a share of the entries between 0 and 1 such as 0.005", f"'{text}'")

    def __str__(self) -> str:
        return repr(self.share)

    def count(self, rows: int, columns: int) -> int:
        """The number of outliers of a matrix."""
        return round(self.share * rows * columns)


@dataclass(frozen=True)
class Columns(TextForm):
    """`count` columns of each matrix, those of the inputs with the largest magnitudes."""

    count: int
    int8: bool = False

    @classmethod
    def parse(cls, text: str | Columns) -> Columns:
        """Reads the text form. Raises UsageError."""
        if isinstance(text, Columns):
            return text
        match = re.fullmatch(r"(?P<count>[1-9]\d{0,6})(?P<int8>-int8)?", text, re.ASCII)
        if match is None:
            raise UsageError(f"columns '{text}'", "a number of columns such as 256, or 256-int8", f"'{text}'")
        return cls(int(match["count"]), match["int8"] is not None)

    @staticmethod
    def count_of(kept: float, width: int) -> int:
        """The columns that are kept of `width`: a share below 1, or a number from 1 on; the next multiple of UNIT."""
        return math.ceil((kept * width if kept < 1 else kept) / UNIT - 1e-9) * UNIT

    def __str__(self) -> str:
        return f"{self.count}{'-int8' if self.int8 else ''}"


@dataclass(frozen=True)
class Lowrank(TextForm):
    """Factors [rows, rank] and [rank, columns]; int8 ones share a scale for each rank."""

    rank: int
    int8: bool = False

    @classmethod
    def parse(cls, text: str | Lowrank) -> Lowrank:
        """Reads the text form. Raises UsageError."""
        if isinstance(text, Lowrank):
            return text
        match = re.fullmatch(r"r(?P<rank>[1-9]\d{0,5})(?P<int8>-int8)?", text, re.ASCII)
        if match is None:
            raise UsageError(f"lowrank '{text}'", "a rank such as r8, or r8-int8", f"'{text}'")
        return cls(int(match["rank"]), match["int8"] is not None)

    def __str__(self) -> str:
        return f"r{self.rank}{'-int8' if self.int8 else ''}"
