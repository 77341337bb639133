"""GPTQ: rounds columns in turn, each making up for the errors before it.

Legend: W [rows, n] weights, Q their dequantized codes, D = W - Q; H [n, n] mean outer product of the inputs, lambda its
damping, F and R its factor (see hessian.py); s scale, z zero point, c = code - z, so that q = s c.
Loss: trace(D H D^T), the mean squared change of the layer's outputs, summed over outputs.

First pass (Frantar et al., 2210.17323). Columns are rounded in turn, column k not from w_k but from its target
    t_k = w_k + sum_(j<k) d_j F_jk,    and    trace(D (H + lambda I) D^T) = sum_k R_kk^2 |t_k - q_k|^2
whatever the codes. Scales are fitted to a group's targets when its first column is reached or, if columns are not
rounded in stored order (or `refit` is off), to the weights before anything is rounded.

Sweeps (coordinate descent; never raise the damped loss). With all others fixed, the best value of column k is
    t_k = q_k + (D (H + lambda I))_k / (H_kk + lambda),
the first pass's form with other coefficients, so both share `_round`. A group's scale is first set to the optimum for its
codes (rescale.py), which costs little because D H is already computed. Where a scheme has minima q = s c + m with c = code,
and scale and minimum move together.

A K-quant's scales and minima are fitted in the same way, those of a super-block together, but sweeps leave them as they are,
because one level cannot move without the other. On a grid of floats c is the grid value nearest to t / s. Scales are fitted to
the weights before anything is rounded and never changed, because they may depend on each other. All else is the same, the
identity included.

Everything is computed on W^T, where a column is contiguous. The contribution of earlier blocks of columns to a block's
targets is one matrix product; inside a block the same is done recursively by halves. Along the outputs, as a Conv1D is
grouped, each column has its own scales over groups of rows; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from compress.numerics import kquants, rescale
from compress.numerics.floats import decode, encode
from compress.numerics.gptq_task import Rows, Settings, Task
from compress.numerics.hessian import Factor, energies
from compress.numerics.rounding import fit_all, largest
from compress.numerics.scales import divisor, steps
from compress.spec.scheme import SUPER, Scheme

_BLOCK = 128
"""Columns of a block, whose targets come from one matrix product."""
_LEAF = 16
"""Columns below which a block is no longer halved."""
_ROWS = 4096
"""Rows processed at a time: enough for efficient products, few enough for a leaf's errors to stay in a core's cache."""
_WHOLE = 512
"""Groups up to this size are swept as one block, so that their scale can move too."""


class Solved(NamedTuple):
    """codes uint8 [rows, n], scale as stored, zero uint8 (or the minimum), or None; along the outputs codes are [n, rows]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    losses: torch.Tensor
    """D H D^T of each row with undamped H; columns whose input was always zero do not count."""
    norms: torch.Tensor
    """W H W^T of each row."""
    errors: torch.Tensor
    """|W - Q|^2 of each row."""
    identity: float
    """sum_k R_kk^2 |t_k - q_k|^2 of the first pass, equal to its trace(D (H + lambda I) D^T)."""
    tensor_scale: torch.Tensor | None = None
    levels: kquants.Levels | None = None
    """The scales and minima of a K-quant, of which `scale` and `zero` are then the values."""

    @property
    def loss(self) -> float:
        """trace(D H D^T)."""
        return float(self.losses.double().sum())

    @property
    def norm(self) -> float:
        """trace(W H W^T)."""
        return float(self.norms.double().sum())


def solve(
    w: torch.Tensor,
    factor: Factor,
    hessian: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    settings: Settings | None = None,
    *,
    mask: torch.Tensor | None = None,
    peak: float | None = None,
) -> Solved:
    """Codes for `w` [rows, n] whose inputs have the mean outer product `hessian` [n, n], factored in `factor`.

    Rows are independent, so weights that read the same inputs may be stacked. `mask` is False where a weight
    must stay zero. `peak` is the largest magnitude among all that share the scale of the matrix, if more than `w` do.
    """
    settings = settings or Settings()
    rows, n = w.shape
    inputs = settings.along == "inputs"
    length = n if inputs else rows
    fixed = scale = tensor_scale = None
    # The values of a K-quant's scales are exact in fp32.
    scale_dtype = torch.float32 if scheme.scales == "k" else scale_dtype
    if not scheme.whole:
        # In stored order, with the columns that become zero set to zero.
        stored = w.masked_fill(factor.dead, 0) if inputs else w.masked_fill(factor.dead, 0).T
        peak = largest(stored) if peak is None else peak
        scale = fit_all(stored, scheme, scale_dtype, settings.clip, peak, hessian.diagonal() if inputs else None)
        tensor_scale = divisor(peak, scheme, w.device)
        each = steps(scale, tensor_scale).to(factor.feedback.dtype)
        fixed = each.repeat_interleave(scheme.rows_per_scale(len(stored)), dim=0)[: len(stored)]
    task = Task(factor, hessian, scheme, scale_dtype, settings, scheme.group or length, fixed)
    codes = torch.empty((rows, n) if inputs else (n, rows), dtype=torch.uint8, device=w.device)
    scale = torch.empty(len(codes), -(-length // task.group), dtype=scale_dtype, device=w.device) if scale is None else scale
    kind = scale_dtype if scheme.minimum else torch.uint8
    levels: list[kquants.Levels] = []
    zero = None if scheme.symmetric else torch.empty(scale.shape, dtype=kind, device=w.device)
    losses, norms, errors = torch.empty(3, rows, dtype=factor.feedback.dtype, device=w.device)
    identity = 0.0
    step = _ROWS if inputs else max(1, _ROWS // task.group) * task.group
    for start in range(0, rows, step):
        rs = slice(start, min(rows, start + step))
        part = _begin(w[rs], None if mask is None else mask[rs], task, rs)
        norms[rs] = energies(part.flat, hessian)[: rs.stop - start]
        damped = _first_pass(part, task)
        identity += float(damped.sum())
        for _ in range(settings.sweeps):
            damped -= _sweep(part, task)
        moved = part.flat.square().sum(0)
        losses[rs] = (damped - factor.ridge * moved)[: rs.stop - start]
        errors[rs] = moved[: rs.stop - start] + w[rs][:, factor.dead].square().sum(1)
        found = part.codes.view(n, -1)[:, : rs.stop - start]
        if inputs:
            codes[rs] = found.T
        else:
            codes[:, rs] = found
        if part.levels is not None:
            levels.append(kquants.joined([part.levels[i] for i in range(n // SUPER)], 1))
        at = rs if inputs else (slice(None), slice(start // task.group, start // task.group + part.scale.shape[1]))
        for whole, own in ((None if task.fixed is not None else scale, part.scale), (zero, part.zero)):
            if whole is not None:
                whole[at] = own.squeeze(1).T if inputs else own.squeeze(2)
    both = kquants.joined(levels, 0) if levels else None
    return Solved(codes, scale, zero, losses, norms, errors, identity, tensor_scale, both)


def _begin(w: torch.Tensor, mask: torch.Tensor | None, task: Task, rs: slice) -> Rows:
    rows, n = w.shape
    inputs = task.along == "inputs"
    width = rows if inputs else -(-rows // task.group) * task.group
    shape = (n, 1, width) if inputs else (n, width // task.group, task.group)
    d = torch.zeros(n, width, dtype=task.factor.feedback.dtype, device=w.device)
    d[:, :rows] = w.T
    d[task.factor.dead] = 0
    keep = None
    # Where no code need mean zero, what padding and columns without inputs then have costs nothing.
    if mask is not None or task.scheme.zeroless:
        keep = torch.ones(n, width, dtype=torch.uint8, device=w.device)
        if mask is not None:
            keep[:, :rows] = mask.T
        if task.scheme.zeroless:
            keep[task.factor.dead] = 0
            keep[:, rows:] = 0
        keep = keep.view(shape)
    scales = (-(-n // task.group), 1, width) if inputs else (n, width // task.group, 1)
    s = torch.ones(scales, dtype=d.dtype, device=w.device)
    if task.fixed is not None:
        first = rs.start // task.group
        s = (task.fixed[rs].T if inputs else task.fixed[:, first : first + scales[1]]).contiguous().view(scales)
    codes = torch.empty(shape, dtype=torch.uint8, device=w.device)
    return Rows(d.view(shape), codes, s, torch.full_like(s, task.scheme.middle), keep, {} if task.scheme.scales == "k" else None)


def _first_pass(part: Rows, task: Task) -> torch.Tensor:
    """Rounds every column once; the damped loss of each row."""
    n, order = len(part.d), task.factor.order
    columns = torch.arange(n, device=part.d.device) if order is None else order
    fixed = not task.settings.refit or order is not None or task.fixed is not None
    if fixed and task.fixed is None:
        _fit_all(part, task)
    if order is not None:
        _permute(part, order)
    # Scales that are refitted need the targets of all their columns at once.
    size = task.unit if task.along == "inputs" and not fixed else _BLOCK
    f, pivots, flat = task.factor.feedback, task.factor.pivots, part.flat
    damped = torch.zeros(flat.shape[1], dtype=flat.dtype, device=flat.device)
    for start in range(0, n, size):
        ks = slice(start, min(n, start + size))
        target = part.d[ks].clone()
        target.view(len(target), -1).addmm_(f[:start, ks].T, flat[:start])
        if not fixed:
            task.fit(part, ks, target if start == 0 else _aims(target, part.d[ks], f[ks, ks]), pivots[ks])
        for inner in range(start, ks.stop, _BLOCK):
            here = slice(inner, min(ks.stop, inner + _BLOCK))
            t = target[inner - start : here.stop - start]
            t.view(len(t), -1).addmm_(f[start:inner, here].T, flat[start:inner])
            owners = task.owners(columns[here])
            _, residual = _round(t, part.d[here], f[here, here], part, here, owners, task.scheme)
            damped += pivots[here] @ residual.square_().flatten(1)
    if order is not None:
        _permute(part, order.argsort())
    return damped


def _aims(target: torch.Tensor, w: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The optimal unrounded values of a block, [columns, a, b], given the columns before it: estimates of the targets.

    `target` includes only earlier blocks. If every column met its target exactly, d = w - aim would add to the next, so
    aim_k = target_k + sum_(j<k) (w_j - aim_j) F_jk, a triangular system in aim - w.
    """
    n = len(w)
    moved = (target - w).view(n, -1)
    steps: torch.Tensor = torch.linalg.solve_triangular(f.T, moved, upper=False, unitriangular=True)
    return steps.view(w.shape).add_(w)


def _fit_all(part: Rows, task: Task) -> None:
    """Fits the scales of all groups to the weights."""
    n = len(part.d)
    size = task.unit if task.along == "inputs" else _BLOCK
    for start in range(0, n, size):
        ks = slice(start, min(n, start + size))
        task.fit(part, ks, part.d[ks], task.h.diagonal()[ks])


def _permute(part: Rows, order: torch.Tensor) -> None:
    """Reorders columns in place, a few rows at a time, to avoid a second copy of W."""
    for tensor in (part.d, part.codes, part.keep):
        if tensor is not None:
            for piece in tensor.view(len(order), -1).split(256, dim=1):
                piece.copy_(piece[order])


def _sweep(part: Rows, task: Task) -> torch.Tensor:
    """Optimises scales and codes of each block with all others fixed; returns the decrease of each row's damped loss."""
    n, h, ridge, flat = len(part.d), task.h, task.factor.ridge, part.flat
    rescales = task.along == "inputs" and task.group <= _WHOLE and task.fixed is None and part.levels is None
    size = task.group if rescales else _BLOCK
    fallen = torch.zeros(flat.shape[1], dtype=flat.dtype, device=flat.device)
    for start in range(0, n, size):
        ks = slice(start, min(n, start + size))
        owners = task.owners(torch.arange(start, ks.stop, device=flat.device))
        square = h[ks, ks].clone()
        square.diagonal().add_(ridge).masked_fill_(task.factor.dead[ks], 1)
        slope = (h[ks] @ flat).add_(flat[ks], alpha=ridge)
        codes, minimum, keep = part.codes[ks], task.scheme.minimum, None if part.keep is None else part.keep[ks].to(flat.dtype)
        c = decode(codes, task.scheme, flat.dtype) if task.fixed is not None else codes.to(flat.dtype)
        if task.fixed is None and not minimum:
            c.sub_(part.zero[owners])
        if rescales:
            s, m = (own[start // task.group, 0] for own in (part.scale, part.zero))
            if minimum:
                e = torch.ones_like(c) if keep is None else keep
                fallen += rescale.scale_and_minimum(s, m, task.dtype, (c * e)[:, 0], e[:, 0], flat[ks], slope, square)
            else:
                fallen += rescale.scale(s, task.dtype, c[:, 0], flat[ks], slope, square)
        pivots = square.diagonal().clone()
        # The buffer of c holds q, then after rounding q_old - q_new, which is added to d.
        moved = c.mul_(part.scale[owners])
        if minimum:
            moved.add_(part.zero[owners])
        if task.scheme.zeroless and keep is not None:
            moved.mul_(keep)
        target = slope.div_(pivots[:, None]).view(c.shape).add_(moved)
        _, residual = _round(target, moved, square.div_(pivots), part, ks, owners, task.scheme)
        part.d[ks] += moved
        # |t - q_old|^2 - |t - q_new|^2, with t - q_old = residual - moved
        change = residual.mul_(-2).add_(moved).mul_(moved)
        fallen += pivots @ change.flatten(1)
    return fallen


def _round(
    target: torch.Tensor, base: torch.Tensor, f: torch.Tensor, part: Rows, ks: slice, owners: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds columns `ks` in turn, each adding (base - q) f to the targets after it; stores the codes.

    target and base [columns, a, b]; base becomes base - q, and target, also returned with c, the final t - q.
    """
    n, top = len(target), scheme.levels - 1
    s, z = part.scale[owners], part.zero[owners]
    lows, highs, lifts = (-z).unbind(0), (top - z).unbind(0), z.unbind(0)
    values = torch.empty_like(target) if scheme.minimum else None
    keeps = None if part.keep is None else part.keep[ks].to(target.dtype).unbind(0)
    c = torch.empty_like(target)
    flat_target, flat_base = target.view(n, -1), base.view(n, -1)
    # Views are created once: at six calls per column creating them would take half the time.
    rows, targets, bases, cs, scales = (x.unbind(0) for x in (flat_target, target, base, c, s))
    coefficients = f.T.contiguous()

    for start, middle, end in turns(0, n):
        if middle > start:
            flat_target[middle:end].addmm_(coefficients[middle:end, start:middle], flat_base[start:middle])
            continue
        earlier = flat_base[start:end].T
        for k in range(start, end):
            if k > start:
                rows[k].addmv_(earlier[:, : k - start], coefficients[k, start:k])
            if values is not None:
                q = torch.sub(targets[k], lifts[k], out=cs[k]).div_(scales[k]).round_().clamp_(0, top)
                value = torch.addcmul(lifts[k], q, scales[k], out=values[k])
                bases[k].sub_(value if keeps is None else value.mul_(keeps[k]))
                continue
            q = torch.div(targets[k], scales[k], out=cs[k])
            if not scheme.whole:
                q.copy_(decode(encode(q, scheme), scheme, q.dtype))
            elif scheme.symmetric:
                q.round_().clamp_(-scheme.middle, top - scheme.middle)
            else:
                torch.clamp(q.round_(), lows[k], highs[k], out=q)
            if keeps is not None:
                q.mul_(keeps[k])
            bases[k].addcmul_(q, scales[k], value=-1)
    if values is not None:
        part.codes[ks] = c.to(torch.int16).to(torch.uint8)
        return c, target.sub_(values)
    # Via int16, because torch converts floats to uint8 four times slower. Adding zero turns a masked -0 into +0.
    part.codes[ks] = (c + z).to(torch.int16).to(torch.uint8) if scheme.whole else encode(c if keeps is None else c + 0, scheme)
    return c, target.addcmul_(c, s, value=-1)


def turns(start: int, end: int, leaf: int = _LEAF, unit: int = 1) -> Iterator[tuple[int, int, int]]:
    """The order of work inside a block, as (start, middle, end): if middle > start, the errors of columns up to `middle` are
    added to the targets of those after it; else columns `start` to `end` are solved one by one. Halves are whole `unit`s."""
    if end - start <= leaf:
        yield start, start, end
        return
    middle = start + (end - start) // 2 // unit * unit
    yield from turns(start, middle, leaf, unit)
    yield start, middle, end
    yield from turns(middle, end, leaf, unit)
