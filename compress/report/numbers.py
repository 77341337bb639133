"""Numbers: sizes, estimates and protocols, as card and report print them."""

from __future__ import annotations

import math

from compress.evaluate.records import Number, QualityRecord


def size(nbytes: float | None) -> str:
    """`56.73 MB`, in decimal units, as on the Hub."""
    if nbytes is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def estimate(number: Number, share: bool = False) -> str:
    """`0.353 ± 0.009`: as many decimals as the error has sense for; `-` where there is no number."""
    value, error = number.value, number.error
    if value is None:
        return "-"
    factor, unit = (100, " %") if share else (1, "")
    value, error = value * factor, error * factor if error else None
    if not error:
        return f"{value:.4g}{unit}"
    decimals = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}{unit}"


def range_of(errors: list[float | None]) -> str:
    """`0.0102 to 0.0250`, or `-`."""
    known = [error for error in errors if error is not None]
    return f"{min(known):.4f} to {max(known):.4f}" if known else "-"


def protocol(record: QualityRecord) -> str:
    """On what text, and how, a quality was measured."""
    windows = record.tokens // record.length
    against = f"; KL({record.against} || this) in nats per token" if record.against else ""
    errors = f"; ±: the standard error over {windows} windows, taken as independent" if windows > 1 else ""
    return f"{record.protocol}; {record.scored:,} tokens scored{against}{errors}"
