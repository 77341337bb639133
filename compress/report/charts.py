"""Charts: what an artifact's facts look like, as figures of plotly.

A figure carries no colours of paper or text: the page gives it those of day or night. Names are escaped, for plotly reads tags.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeGuard

from compress.report.escape import printable
from compress.report.facts import Facts, Layer
from compress.report.numbers import size
from compress.report.picture import ALIKE

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_BLUE, _RED, _GREEN, _GREY = "#4a8bc2", "#d0694a", "#6aa84f", "#8a8a8a"
_SERIES = (_BLUE, _RED, _GREEN, "#9a78b8", "#c79a2a", "#4fa3a3", "#c06092", _GREY)
_MOST_POINTS = 2000
"""Points of a curve; a longer one is thinned."""


def sizes(facts: Facts) -> Figure | None:
    """A waterfall from the source's bytes to the artifact's."""
    import plotly.graph_objects as go

    known = [(f"{n}. {stage.name}", stage.nbytes) for n, stage in enumerate(facts.stages, 1) if stage.nbytes is not None]
    if not facts.source_bytes:
        return None
    labels, totals = ["source", *(label for label, _ in known)], [facts.source_bytes, *(nbytes for _, nbytes in known)]
    unit, name = _unit(max(totals))
    steps = [totals[0], *(after - before for before, after in itertools.pairwise(totals))]
    figure = go.Figure(go.Waterfall(
        x=[*map(_name, labels), "artifact"], y=[*(step / unit for step in steps), 0],
        measure=["absolute", *["relative"] * len(known), "total"], text=[*map(size, totals), size(totals[-1])],
        textposition="outside", cliponaxis=False, connector={"line": {"color": _GREY, "width": 1}},
        decreasing={"marker": {"color": _GREEN}}, increasing={"marker": {"color": _RED}}, totals={"marker": {"color": _BLUE}},
        hovertemplate="%{x}: %{text}<extra></extra>",
    ))  # fmt: skip
    figure.update_yaxes(title=f"tensors, {name}", range=[0, 1.15 * max(totals) / unit])
    return _plain(figure, 320)


def layers(facts: Facts, number: Callable[[Layer], float | None], what: str) -> Figure | None:
    """A field of rows and blocks: the mean of a number over the weights in each, with all of it to hover over."""
    import plotly.graph_objects as go

    cells: dict[tuple[str, int], list[Layer]] = {}
    for layer in facts.layers:
        if number(layer) is not None:
            cells.setdefault((layer.row, -1 if layer.block is None else layer.block), []).append(layer)
    if not cells:
        return None
    rows = list(dict.fromkeys(row for row, _ in cells))
    places = sorted({place for _, place in cells})
    values = [[_mean(cells.get((row, place), ()), number) for place in places] for row in rows]
    said = [[_said(cells.get((row, place), ())) for place in places] for row in rows]
    known = [value for row in values for value in row if value is not None]
    low, high = min(known), max(known)
    alike = {"zmin": 0.5 * low, "zmax": 1.5 * high} if high - low <= ALIKE * high else {}
    figure = go.Figure(go.Heatmap(
        z=values, x=["-" if place < 0 else str(place) for place in places], y=[_short(row) for row in rows], text=said,
        hovertemplate="%{text}<extra></extra>", colorscale="Viridis", xgap=1, ygap=1, hoverongaps=False,
        colorbar={"orientation": "h", "y": -0.28, "yanchor": "top", "thickness": 10, "title": {"text": what, "side": "bottom"}},
        **alike,
    ))  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title="block", type="category", nticks=12, tickangle=0, showgrid=False)
    return _plain(figure, 170 + 22 * len(rows), bottom=110)


def sensitivity(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """What each weight would cost at the cheapest state, against the bits that it got."""
    import plotly.graph_objects as go

    points = []
    for row in rows:
        told, numel, nbytes = row.get("costs"), row.get("numel"), row.get("bytes")
        costs: dict[str, Any] = told if isinstance(told, dict) else {}
        known = [cost for cost in costs.values() if _real(cost)]
        if known and _real(numel) and _real(nbytes) and numel > 0 and max(known) > 0:
            chosen = costs.get(row["state"])
            name = _name(row["weight"])
            said = f"{name}<br>{_name(row['state'])}, {8 * nbytes / numel:.3f} bits<br>cost {max(known):.3g} at worst"
            points.append((8 * nbytes / numel, max(known), said + (f", {chosen:.3g} as chosen" if _real(chosen) else "")))
    if not points:
        return None
    figure = go.Figure(go.Scatter(
        x=[x for x, _, _ in points], y=[y for _, y, _ in points], text=[said for *_, said in points], mode="markers",
        marker={"color": _BLUE, "size": 8, "opacity": 0.6}, hovertemplate="%{text}<extra></extra>",
    ))  # fmt: skip
    figure.update_xaxes(title="bits per weight, as chosen")
    wide = max(y for _, y, _ in points) >= 10 * min(y for _, y, _ in points)
    figure.update_yaxes(title="cost at the fewest bits offered", type="log", exponentformat="power", dtick=1 if wide else "D2")
    return _plain(figure, 340)


def spread(facts: Facts) -> Figure | None:
    """How many tokens have how much KL, on a log axis, with quantiles."""
    import plotly.graph_objects as go

    found = next((record.spread for record in facts.quality if record.spread is not None), None)
    if found is None or len(found.edges) != len(found.counts) + 1 or not all(edge > 0 for edge in found.edges):
        return None
    middles = [math.sqrt(low * high) for low, high in zip(found.edges, found.edges[1:])]
    widths = [0.95 * (high - low) for low, high in zip(found.edges, found.edges[1:])]
    said = [
        f"{low:.3g} to {high:.3g} nats: {count:,} tokens" for low, high, count in zip(found.edges, found.edges[1:], found.counts)
    ]
    figure = go.Figure(go.Bar(
        x=middles, y=found.counts, width=widths, marker={"color": _BLUE}, text=said, textposition="none",
        hovertemplate="%{text}<extra></extra>",
    ))  # fmt: skip
    used = [place for place, count in enumerate(found.counts) if count]
    if used:
        figure.update_xaxes(range=[math.log10(found.edges[used[0]]) - 0.1, math.log10(found.edges[used[-1] + 1]) + 0.1])
    for share, word in (("0.5", "median"), ("0.99", "99 %")):
        if (value := found.quantiles.get(share, 0)) > 0:
            figure.add_vline(x=value, line={"color": _RED, "width": 1, "dash": "dot"})
            # Unlike a shape, a note on a log axis lies at the logarithm.
            where = {"x": math.log10(value), "y": 1, "yref": "paper", "yanchor": "bottom"}
            figure.add_annotation(text=word, showarrow=False, font={"size": 11}, **where)
    figure.update_xaxes(title="KL, nats per token", type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(title="tokens")
    return _plain(figure, 300)


def training(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """The losses of a training step; where there is no one loss, all numbers that it tells."""
    import plotly.graph_objects as go

    known = [word for word in rows[0] if word not in ("step", "tokens", "lr", "norm") and _real(rows[0][word])]
    words = ["loss"] if "loss" in known else known[: len(_SERIES)]
    if not words:
        return None
    thin = rows[:: max(1, math.ceil(len(rows) / _MOST_POINTS))]
    figure = go.Figure()
    for word, colour in zip(words, _SERIES):
        values = [row.get(word) if _real(row.get(word)) else None for row in thin]
        mode = "lines" if len(thin) > 60 else "lines+markers"
        figure.add_scatter(x=[row["step"] for row in thin], y=values, mode=mode, name=_name(word), line={"color": colour})
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="nats per token" if words == ["loss"] else "")
    return _plain(figure, 300, legend=len(words) > 1)


def seconds(facts: Facts) -> Figure | None:
    """Time of each step, by kind of work where that is known."""
    import plotly.graph_objects as go

    known = [(f"{n}. {stage.name}", stage) for n, stage in enumerate(facts.stages, 1) if stage.seconds is not None]
    if not known:
        return None
    kinds = list(dict.fromkeys(word for _, stage in known for word in stage.spent))
    figure = go.Figure()
    labels = [_name(label) for label, _ in known]
    for word, colour in zip(kinds, _SERIES):
        figure.add_bar(y=labels, x=[stage.spent.get(word, 0) for _, stage in known], name=_name(word), orientation="h",
                       marker={"color": colour}, hovertemplate="%{x:.1f} s<extra>%{fullData.name}</extra>")  # fmt: skip
    rest = [
        max(0.0, (stage.seconds or 0) - sum(stage.spent.get(word, 0) for word in kinds[: len(_SERIES)])) for _, stage in known
    ]
    figure.add_bar(y=labels, x=rest, name="rest" if kinds else "all", orientation="h", marker={"color": _GREY},
                   hovertemplate="%{x:.1f} s<extra>%{fullData.name}</extra>")  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="seconds", rangemode="tozero")
    return _plain(figure, 130 + 40 * len(known), legend=bool(kinds))


def memory(facts: Facts) -> Figure | None:
    """Peak memory of the process at the end of each step."""
    import plotly.graph_objects as go

    known = [(f"{n}. {stage.name}", stage.peak_bytes) for n, stage in enumerate(facts.stages, 1) if stage.peak_bytes]
    if not known:
        return None
    unit, name = _unit(max(peak for _, peak in known))
    figure = go.Figure(go.Bar(
        y=[_name(label) for label, _ in known], x=[peak / unit for _, peak in known], text=[size(peak) for _, peak in known],
        orientation="h", marker={"color": _BLUE}, hovertemplate="%{y}: %{text}<extra></extra>", textposition="auto",
    ))  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title=f"peak resident memory so far, {name}", rangemode="tozero")
    return _plain(figure, 110 + 40 * len(known))


def pareto(points: Sequence[tuple[str, int, float, float | None]], measure: str) -> Figure | None:
    """Artifacts by bytes and by loss of quality (name, bytes, value, error), and the line of those that none beats in both."""
    import plotly.graph_objects as go

    if not points:
        return None
    unit, name = _unit(max(nbytes for _, nbytes, _, _ in points))
    best = front([(nbytes, value) for _, nbytes, value, _ in points])
    figure = go.Figure(go.Scatter(
        x=[points[at][1] / unit for at in best], y=[points[at][2] for at in best], mode="lines", name="Pareto line",
        line={"color": _GREY, "dash": "dot", "shape": "hv"}, hoverinfo="skip",
    ))  # fmt: skip
    figure.add_scatter(
        x=[nbytes / unit for _, nbytes, _, _ in points], y=[value for _, _, value, _ in points], mode="markers+text",
        name="artifacts", text=[_name(label) for label, *_ in points], textposition="top center", cliponaxis=False,
        error_y={"type": "data", "array": [error or 0 for *_, error in points], "color": _BLUE},
        marker={"color": _BLUE, "size": 10}, hovertemplate="%{text}<br>%{x:.2f} " + name + ", %{y:.4g}<extra></extra>",
    )  # fmt: skip
    log = all(value > 0 for _, _, value, _ in points)
    figure.update_xaxes(title=f"tensors, {name}", rangemode="tozero")
    figure.update_yaxes(title=measure, type="log" if log else "linear")
    return _plain(figure, 400, legend=True)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of points that no other is at most as large as in both numbers, from the smallest first number up."""
    found: list[int] = []
    for at in sorted(range(len(points)), key=lambda at: points[at]):
        if not found or points[at][1] < points[found[-1]][1]:
            found.append(at)
    return found


def _plain(figure: Figure, height: int, bottom: int = 50, legend: bool = False) -> Figure:
    """The figure without paper, with the margins of all."""
    figure.update_layout(
        template=None, height=height, margin={"l": 10, "r": 16, "t": 24, "b": bottom}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", showlegend=legend, dragmode=False, hoverlabel={"align": "left"},
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "traceorder": "normal", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )  # fmt: skip
    figure.update_xaxes(automargin=True, fixedrange=True)
    figure.update_yaxes(automargin=True, fixedrange=True)
    return figure


def _name(text: str) -> str:
    return escape(printable(text))


def _short(row: str) -> str:
    """The end of a row's name, escaped."""
    tail = row.rpartition("*.")[2] or row
    return _name(tail if len(tail) <= 28 else f"...{tail[-25:]}")


def _mean(found: Sequence[Layer], number: Callable[[Layer], float | None]) -> float | None:
    known = [(value, layer.numel) for layer in found if (value := number(layer)) is not None]
    total = sum(numel for _, numel in known)
    return round(sum(value * numel for value, numel in known) / total, 6) if total else None


def _said(found: Sequence[Layer]) -> str:
    """What hovering over a cell tells: the first weight in it, and how many there are."""
    if not found:
        return ""
    layer = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    errors = [("error", layer.error), ("error of outputs", layer.output_error)]
    lines = [f"{_name(layer.name)}{more}", f"{_name(str(layer.state))}, {layer.bits:.3f} bits"]
    return "<br>".join([*lines, *(f"{what} {value:.4f}" for what, value in errors if value is not None)])


def _unit(nbytes: float) -> tuple[int, str]:
    for power, name in enumerate(("B", "kB", "MB", "GB")):
        if nbytes < 1000 ** (power + 1):
            return 1000**power, name
    return 1000**4, "TB"


def _real(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
