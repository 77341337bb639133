"""Rounding to nearest, for every scheme: a dense matrix becomes a QTensor.

Integers use grid.py, all other grids scales.py and floats.py; in fp32, some rows at a time.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from compress.numerics import kquants, minimum
from compress.numerics.floats import decode, encode
from compress.numerics.grid import round_to_nearest
from compress.numerics.input_rotation import rotated
from compress.numerics.lowrank import Factors
from compress.numerics.outliers import Sparse, split
from compress.numerics.qtensor import QTensor, integers
from compress.numerics.scales import blocked, divisor, fit, flat, spread, steps
from compress.spec.corrections import Outliers
from compress.spec.scheme import Scheme

_CHUNK = 1 << 18
"""Elements processed at a time."""


class Rounded(NamedTuple):
    """The codes of a weight with |W - W'|^2 and |W|^2."""

    q: QTensor
    squared_error: float
    squared_norm: float

    @property
    def error(self) -> float:
        """|W - W'| / |W|."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


def nearest(
    w: torch.Tensor, scheme: Scheme, dtype: torch.dtype, clip: str = "none", least_zero: int = 0, peak: float | None = None,
    outliers: Outliers | None = None, least_code: int = 0,
) -> Rounded:  # fmt: skip
    """Rounds `w` [experts?, rows, columns], a weight of `dtype`, to `scheme`.

    `clip="mse"` searches each group's range for the least squared error; `least_zero` is the smallest zero point of
    asymmetric codes; `peak` is the largest magnitude of all weights that share the matrix's scale, if `w` is not the only one;
    `least_code` is the smallest code of integers that is used.
    Outliers are split off before anything is fitted, and stored next to the codes.
    """
    w = rotated(w, scheme.hadamard)
    if outliers is not None:
        rest, _, sparse = split(w, outliers)
        sparse = replace(sparse, values=sparse.values.to(dtype))
        found = nearest(rest, scheme, dtype, clip, least_zero, peak, None, least_code)
        kept = float(sparse.values.double().square().sum())
        if scheme.zeroless:  # no code need mean the zero that the rest has in their places
            under = found.q.values().view(-1, w.shape[-1])[sparse.places()]
            found = found._replace(squared_error=found.squared_error - float(under.double().square().sum()))
        return Rounded(replace(found.q, outliers=sparse), found.squared_error, found.squared_norm + kept)
    if scheme.integer:
        codes, scale, zero, *sums = round_to_nearest(w.reshape(-1, w.shape[-1]), scheme, dtype, clip, least_zero, least_code)
        zero = None if zero is None else zero.reshape(*w.shape[:-1], -1)
        return Rounded(integers(scheme, codes.reshape(w.shape), scale.reshape(*w.shape[:-1], -1), zero), *sums)
    if scheme.scales == "k":
        return _two_levels(w, scheme, clip)
    if w.dim() == 2:
        return _matrix(w, scheme, dtype, clip, peak)
    experts = [_matrix(expert, scheme, dtype, clip, None) for expert in w]
    return Rounded(stacked([e.q for e in experts]), sum(e.squared_error for e in experts), sum(e.squared_norm for e in experts))


def _two_levels(w: torch.Tensor, scheme: Scheme, clip: str) -> Rounded:
    """`w` [experts?, rows, columns] rounded to a K-quant."""
    rows, columns = w.shape[:-1].numel(), w.shape[-1]
    codes, levels, sums = torch.empty(rows, columns, dtype=torch.uint8, device=w.device), [], [0.0, 0.0]
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        x = kquants.blocked(w.reshape(rows, columns)[start : start + step].float(), scheme)
        found = kquants.fit(x, None, scheme, clip)
        q, lows = kquants.codes(x, found, scheme), found.lows()
        codes[start : start + step] = q.flatten(1).to(torch.int16).to(torch.uint8)
        levels.append(found)
        lost = kquants.values(q, found.steps()[..., None], None if lows is None else lows[..., None], scheme).sub_(x)
        for i, values in enumerate((lost.reshape(-1), x.reshape(-1))):
            sums[i] += float(torch.dot(values, values))
    return Rounded(kquants.joined(levels, 0).of(scheme, codes.reshape(w.shape)), sums[0], sums[1])


def on_grid(w: torch.Tensor, q: QTensor) -> QTensor:
    """`w` [experts?, rows, columns] rounded to nearest with the scales and zero points or minima of `q`."""
    w = rotated(w, q.scheme.hadamard)
    s = spread(q.steps(), q.scheme, *w.shape[-2:])
    if (lows := q.lows()) is not None:
        m = spread(lows, q.scheme, *w.shape[-2:])
        return replace(q, codes=minimum.codes(w.float(), s, m, q.scheme).to(torch.uint8))
    x = w.float() / s
    if not q.scheme.whole:
        return replace(q, codes=encode(x, q.scheme))
    zero = q.scheme.middle if q.zero is None else spread(q.zero, q.scheme, *w.shape[-2:])
    return replace(q, codes=x.round_().add_(zero).clamp_(0, q.scheme.levels - 1).to(torch.uint8))


def stacked(matrices: list[QTensor]) -> QTensor:
    """The QTensor of fused experts from those of each expert."""

    def stack(parts: list[Any]) -> Any:
        if isinstance(parts[0], QTensor | Sparse | Factors):
            names = [field.name for field in fields(parts[0]) if field.name != "scheme"]
            return replace(parts[0], **{name: stack([getattr(part, name) for part in parts]) for name in names})
        return None if parts[0] is None else torch.stack(parts)

    found = stack(matrices)
    assert isinstance(found, QTensor)
    return found


def unstacked(experts: QTensor) -> list[QTensor]:
    """The inverse of `stacked`."""

    def cut(part: Any, number: int) -> Any:
        if isinstance(part, QTensor | Sparse | Factors):
            names = [field.name for field in fields(part) if field.name != "scheme"]
            return replace(part, **{name: cut(getattr(part, name), number) for name in names})
        return None if part is None else part[number]

    return [cut(experts, number) for number in range(len(experts.codes))]


def largest(w: torch.Tensor) -> float:
    """The largest magnitude of a tensor; NaN if any entry is."""
    low, high = w.aminmax()
    return float(torch.maximum(low.neg(), high))


def _bands(w: torch.Tensor, scheme: Scheme) -> list[slice]:
    """Slices of about a chunk of elements; they do not cut through the rows of a scale, unless the matrix has only one."""
    rows, columns = w.shape
    height = 1 if scheme.scales == "tensor" else scheme.rows_per_scale(rows)
    step = max(1, _CHUNK // max(1, columns) // height) * height
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def fit_all(
    w: torch.Tensor, scheme: Scheme, dtype: torch.dtype, clip: str, peak: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The scales of a matrix [r, g] in their stored form; see `fit`."""
    if scheme.scales == "tensor":
        return fit(w[:1], scheme, dtype, clip, peak)
    return torch.cat([fit(w[rows].float().contiguous(), scheme, dtype, clip, peak, weight) for rows in _bands(w, scheme)])


def _matrix(w: torch.Tensor, scheme: Scheme, dtype: torch.dtype, clip: str, peak: float | None) -> Rounded:
    rows, columns = w.shape
    peak = largest(w) if peak is None else peak
    scale, d = fit_all(w, scheme, dtype, clip, peak), divisor(peak, scheme, w.device)
    s = steps(scale, d)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=w.device)
    sums = [0.0, 0.0]
    for part in _bands(w, scheme):
        x = blocked(w[part].float(), scheme)
        height = scheme.rows_per_scale(rows)
        own = s if len(s) == 1 else s[part.start // height : -(-part.stop // height)]
        over = own[:, None, :, None]
        found = encode(x / over, scheme)
        codes[part] = flat(found, part.stop - part.start, columns)
        error = flat(decode(found, scheme).mul_(over).sub_(x), part.stop - part.start, columns)
        for i, values in enumerate((error.reshape(-1), x.reshape(-1))):
            sums[i] += float(torch.dot(values, values))
    return Rounded(QTensor(scheme, codes, scale, None, d), sums[0], sums[1])
