"""Picture: bits and errors of the layers, as a small SVG for the card.

Written by hand, for a run makes one each time and a library of plots takes longer to import than a small run takes. The same
layers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from compress.report.escape import printable
from compress.report.facts import Layer

_CELL, _HIGH, _CHARACTER, _TOP, _MOST_ROWS = 14, 16, 7, 20, 40
ALIKE = 0.01
"""Numbers that differ by no more than this share of the largest have one colour."""
_RAMP = ((233, 241, 247), (47, 101, 148))
"""The colours of the smallest and the largest number."""


def picture(layers: Sequence[Layer]) -> str:
    """The SVG: a panel of bits, and one of errors where they are known; empty without layers."""
    panels: list[tuple[str, Callable[[Layer], float | None]]] = [("bits per weight, scales included", lambda layer: layer.bits)]
    if layers and all(layer.state.scheme is None and layer.zeros is not None for layer in layers):
        panels = [("share of zeros", lambda layer: layer.zeros)]
    if any(layer.output_error is not None for layer in layers):
        panels.append(("error of outputs on the calibration tokens", lambda layer: layer.output_error))
    elif any(layer.error is not None for layer in layers):
        panels.append(("error of weights", lambda layer: layer.error))
    rows = list(dict.fromkeys(layer.row for layer in layers))[:_MOST_ROWS]
    if not rows:
        return ""
    places = sorted({-1 if layer.block is None else layer.block for layer in layers})
    left = math.ceil(max(map(len, map(_short, rows))) * _CHARACTER) + 8
    width, parts, top = max(left + _CELL * len(places) + 8, left + 260), [], 0
    for title, number in panels:
        drawn, high = _panel(title, rows, places, _means(layers, number), left)
        parts.append(f'<g transform="translate(0 {top})">\n{drawn}\n</g>')
        top += high
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}">'
    style = (
        "<style>text{font:11px ui-monospace,monospace;fill:#333}.t{font-family:sans-serif;font-weight:600}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
    )
    return "\n".join([head, style, *parts, "</svg>", ""])


def _panel(
    title: str, rows: Sequence[str], places: Sequence[int], cells: dict[tuple[str, int], float], left: int
) -> tuple[str, int]:
    low, high = min(cells.values(), default=0.0), max(cells.values(), default=0.0)
    said = f"{low:.4g} to {high:.4g}" if high - low <= ALIKE * high else f"{low:.4g} (pale) to {high:.4g} (dark)"
    said = f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else said
    lines = [f'<text class="t" x="4" y="13">{title}: {said}</text>']
    for number, row in enumerate(rows):
        y = _TOP + number * _HIGH
        lines.append(f'<text x="4" y="{y + 11}">{escape(_short(row))}</text>')
        for at, place in enumerate(places):
            if (value := cells.get((row, place))) is not None:
                # A difference of padding only is none to look at.
                share = 0.5 if high - low <= ALIKE * high else (value - low) / (high - low)
                colour = "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*_RAMP, strict=True))
                lines.append(f'<rect x="{left + at * _CELL}" y="{y}" width="{_CELL - 1}" height="{_HIGH - 1}" fill="#{colour}"/>')
    y = _TOP + len(rows) * _HIGH + 11
    for at in range(0, len(places), max(1, math.ceil(len(places) / 10))):
        lines.append(f'<text x="{left + at * _CELL}" y="{y}">{"-" if places[at] < 0 else places[at]}</text>')
    lines.append(f'<text x="4" y="{y}">block</text>')
    return "\n".join(lines), y + 14


def _means(layers: Sequence[Layer], number: Callable[[Layer], float | None]) -> dict[tuple[str, int], float]:
    """The mean over the weights of each row and block: one, or all experts."""
    sums: dict[tuple[str, int], tuple[float, int]] = {}
    for layer in layers:
        if (value := number(layer)) is not None:
            place = (layer.row, -1 if layer.block is None else layer.block)
            total, numel = sums.get(place, (0.0, 0))
            sums[place] = total + value * layer.numel, numel + layer.numel
    return {place: total / numel for place, (total, numel) in sums.items() if numel}


def _short(row: str) -> str:
    """The end of a row's name, which tells it from others."""
    tail = printable(row).rpartition("*.")[2] or printable(row)
    return tail if len(tail) <= 40 else f"...{tail[-37:]}"
