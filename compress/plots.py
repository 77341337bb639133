"""Plots of a run as SVG: losses, domains, stages by size and KL, bits by block.

The same rows give the same bytes, so that a picture can be committed and compared. Matplotlib is imported only to draw; the
user's matplotlib settings are neither read nor changed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "compress",
    # Text stays text, for small files and searchable names. Fallback fonts are no wider than matplotlib's own.
    "svg.fonttype": "none",
    # A name with a dollar sign is not parsed as a formula.
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#444444",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#8a8a8a",
    "ytick.color": "#8a8a8a",
    "xtick.labelcolor": "#444444",
    "ytick.labelcolor": "#222222",
    "text.color": "#222222",
}
_BLUE, _PALE, _RED, _GREY = "#2f6594", "#a9c4dc", "#b5573a", "#767676"
_SERIES = (_BLUE, _RED, "#5d8a3c", "#8460a0", "#b98a1d", "#3d8f8f", "#a8487c", _GREY)
"""Colours of curves side by side; more curves have them again, dashed."""
_SMOOTH_SHARE = 0.05
"""A smoothed loss is the mean over this share of a run."""


@dataclass(frozen=True)
class Stage:
    """One checkpoint of a run: its size and its quality."""

    name: str
    nbytes: int
    bits: float
    """Per weight."""
    perplexity: float
    kl: float | None
    """KL to the source, in nats per token; None for the source itself."""
    kl_error: float | None
    """Its standard error."""


def losses(path: Path, rows: Sequence[Mapping[str, float]], title: str) -> None:
    """Draws rows of `step`, `loss`, `lr` and `tokens` (so far); raises ValueError where there are none."""
    if not rows:
        raise ValueError("there are no rows to draw")
    steps = [row["step"] for row in rows]
    with _page(path, (7.2, 4.2), title) as page:
        above, below = page.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        loss = [row["loss"] for row in rows]
        # A single point is drawn as a marker, since it makes no line.
        marker = "o" if len(rows) == 1 else ""
        above.plot(steps, loss, color=_PALE, linewidth=0.8, marker=marker, markersize=3, label="each step")
        above.plot(steps, _smooth(loss), color=_BLUE, linewidth=1.8, marker=marker, markersize=3, label="smoothed")
        above.set_title("loss, nats per token")
        above.legend(frameon=False, loc="upper right")
        above.margins(x=0.02, y=0.08)
        below.plot(steps, [row["lr"] for row in rows], color=_GREY, linewidth=1.2, marker=marker, markersize=3)
        below.set_title("learning rate")
        below.set_ylim(bottom=0)
        below.locator_params(axis="y", nbins=3)
        below.yaxis.set_major_formatter(_plain)
        below.set_xlabel(f"step ({rows[-1]['tokens']:,.0f} tokens in all)")
        for axes in (above, below):
            axes.grid(axis="y")
            axes.tick_params(length=0)
        if len(rows) == 1:
            below.set_xticks(steps, [f"{steps[0]:.0f}"])
        else:
            below.locator_params(axis="x", integer=True)


def domains(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws rows of `step` and `domains` (by name: weight, loss, reference); raises ValueError where there are none."""
    if not rows:
        raise ValueError("there are no rows to draw")
    steps, names = [row["step"] for row in rows], list(rows[0]["domains"])
    with _page(path, (7.2, 5.2), title) as page:
        above, below = page.subplots(2, 1, sharex=True)
        for number, name in enumerate(names):
            found = [row["domains"][name] for row in rows]
            excess = [math.nan if one["loss"] is None else one["loss"] - one["reference"] for one in found]
            dashes = "--" if number >= len(_SERIES) else "-"
            how = {"color": _SERIES[number % len(_SERIES)], "linestyle": dashes, "linewidth": 1.6, "marker": "o", "markersize": 3}
            above.plot(steps, [one["weight"] for one in found], label=name, **how)
            below.plot(steps, excess, **how)
        above.set_title("share of the samples from here on")
        above.set_ylim(0, 1)
        below.set_title("loss above the reference, nats per token")
        below.axhline(0, color=_GREY, linewidth=0.8)
        below.set_xlabel("step")
        below.locator_params(axis="x", integer=True)
        above.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
        for axes in (above, below):
            axes.grid(axis="y")
            axes.tick_params(length=0)


def stages(path: Path, stages: Sequence[Stage], title: str) -> None:
    """Draws a bar of bytes and a bar of KL for each stage, the first on top; raises ValueError where there are none."""
    if not stages:
        raise ValueError("there are no stages to draw")
    with _page(path, (10.5, 1.35 + 0.34 * len(stages)), title) as page:
        left, right = page.subplots(1, 2, sharey=True)
        places = range(len(stages))
        biggest = max(stage.nbytes for stage in stages)
        unit, name = _unit(biggest)
        left.barh(places, [stage.nbytes / unit for stage in stages], height=0.62, color=_BLUE)
        left.set_title(f"size, {name}")
        left.set_xlim(0, biggest / unit or 1)
        _numbers(left, [f"{_size(stage.nbytes)}, {stage.bits:.2f} bits" for stage in stages])
        left.set_yticks(places, [stage.name for stage in stages])
        left.set_ylim(len(stages) - 0.5, -0.5)
        _kl_bars(right, stages)
        _numbers(right, [_kl_text(stage) for stage in stages])
        right.set_title("KL to the source, nats per token (log scale)")
        for axes in (left, right):
            axes.grid(axis="x")
            axes.tick_params(length=0)
            axes.spines["bottom"].set_visible(False)


def allocation(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws rows of `weight`, `block`, `bytes` and `numel`, a column a block: bits per weight, or for plain masked weights the
    share of `zeros`. Raises ValueError for none."""
    if not rows:
        raise ValueError("there are no rows to draw")
    places = sorted({-1 if row["block"] is None else row["block"] for row in rows})
    masked = all("zeros" in row for row in rows)
    cells: dict[str, dict[int, list[tuple[float, int]]]] = {}
    for row in rows:
        # All experts of a block are one row, of means.
        name = re.sub(r"\.\d+(?=\.)", ".*", row["weight"].removesuffix(".weight"))
        place = -1 if row["block"] is None else row["block"]
        amount = row["numel"] * row["zeros"] if masked else 8 * row["bytes"]
        cells.setdefault(name, {}).setdefault(place, []).append((amount, row["numel"]))

    def mean(found: list[tuple[float, int]]) -> float:
        return sum(amount for amount, _ in found) / sum(numel for _, numel in found) if found else math.nan

    means = [[mean(row.get(place, [])) for place in places] for row in cells.values()]
    with _page(path, (3.6 + 0.28 * max(12, len(places)), 1.3 + 0.28 * len(cells)), title) as page:
        axes = page.subplots()
        mesh = axes.pcolormesh(means, cmap="YlGnBu", edgecolors="white", linewidth=0.7)
        axes.set_yticks([number + 0.5 for number in range(len(cells))], list(cells))
        shown = range(0, len(places), max(1, len(places) // 16))
        axes.set_xticks([at + 0.5 for at in shown], ["none" if places[at] < 0 else str(places[at]) for at in shown])
        axes.invert_yaxis()
        axes.set_xlabel("block")
        axes.tick_params(length=0)
        what = "share of zeros" if masked else "bits per weight, scales included"
        axes.set_title(
            f"{what}: {mean([cell for row in cells.values() for found in row.values() for cell in found]):.3f} over all"
        )
        page.colorbar(mesh, ax=axes, format=_plain).outline.set_visible(False)


def _kl_bars(axes: Axes, stages: Sequence[Stage]) -> None:
    # A value that is not above 0 has no bar on a log axis, but its number is written.
    drawn = [(place, stage.kl, _error(stage)) for place, stage in enumerate(stages) if stage.kl and _positive(stage.kl)]
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(_plain)
    if not drawn:
        axes.set_xticks([])
        return
    low = 10 ** math.floor(math.log10(min(kl for _, kl, _ in drawn) / 1.5))
    high = max(kl + error for _, kl, error in drawn)
    for place, kl, error in drawn:
        axes.barh(place, kl - low, left=low, height=0.62, color=_RED)
        if error:
            # A whisker that reaches below 0 ends at the edge.
            axes.errorbar(kl, place, xerr=[[min(error, kl - low)], [error]], color="#222222", capsize=2.5, elinewidth=1)
    axes.set_xlim(low, high * 1.15)


def _kl_text(stage: Stage) -> str:
    perplexity = f"ppl {stage.perplexity:.2f}" if math.isfinite(stage.perplexity) else ""
    if stage.kl is None:
        kl = "the source"
    else:
        error = _error(stage)
        decimals = max(0, 1 - math.floor(math.log10(error))) if error else 0
        kl = f"{stage.kl:.{decimals}f} ± {error:.{decimals}f}" if error else f"{stage.kl:.3g}"
    return ", ".join(filter(None, (kl, perplexity)))


def _error(stage: Stage) -> float:
    return stage.kl_error if stage.kl_error is not None and _positive(stage.kl_error) else 0.0


def _positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _numbers(axes: Axes, texts: Sequence[str]) -> None:
    """Writes a column of numbers next to the bars, where no bar or whisker overlaps it."""
    for place, text in enumerate(texts):
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)


def _smooth(numbers: Sequence[float]) -> list[float]:
    """Means of the finite values around each, symmetric so that the curve does not lag."""
    total, count = [0.0], [0]
    for number in numbers:
        finite = math.isfinite(number)
        total.append(total[-1] + (number if finite else 0.0))
        count.append(count[-1] + finite)
    reach, last = int(_SMOOTH_SHARE * len(numbers) / 2), len(numbers) - 1
    spans = [(i - min(reach, i, last - i), i + min(reach, i, last - i) + 1) for i in range(len(numbers))]
    return [(total[end] - total[start]) / (count[end] - count[start] or math.nan) for start, end in spans]


def _plain(number: float, place: float) -> str:
    """A tick's label, in full instead of with a common power of ten."""
    return f"{number:g}"


def _unit(nbytes: int) -> tuple[int, str]:
    for power, name in enumerate(("B", "kB", "MB", "GB")):
        if nbytes < 1000 ** (power + 1):
            return 1000**power, name
    return 1000**4, "TB"


def _size(nbytes: int) -> str:
    unit, name = _unit(nbytes)
    return f"{nbytes / unit:.2f} {name}"


@contextmanager
def _away_from_home() -> Iterator[None]:
    """Imports matplotlib with a temporary home: on import it creates folders and a list of fonts there."""
    name = "MPLCONFIGDIR"
    before = os.environ.get(name)
    with TemporaryDirectory(prefix="compress-fonts-") as folder:
        os.environ[name] = before or folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]


@contextmanager
def _page(path: Path, inches: tuple[float, float], title: str) -> Iterator[Figure]:
    """An empty figure that is written when the context ends; SVG, or the format of the suffix."""
    with _away_from_home():
        import matplotlib
        import matplotlib.style
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(), matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=inches, layout=ConstrainedLayoutEngine(wspace=0.05))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        yield figure
        vector = path.suffix == ".svg"
        # Without matplotlib's version, which would change the file with every release.
        metadata = {"Date": None, "Creator": "compress"} if vector else None
        figure.savefig(path, metadata=metadata, dpi=150)
