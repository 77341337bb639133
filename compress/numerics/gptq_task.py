"""GPTQ task: rows that are rounded together, and what is the same for all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from compress.numerics import kquants
from compress.numerics.fit import Clip, fit
from compress.numerics.hessian import Factor
from compress.spec.scheme import SUPER, Scheme

Along = Literal["inputs", "outputs"]


@dataclass
class Rows:
    """Rows that are processed together, transposed: [n, 1, rows], or along the outputs [n, groups, group], zero-padded."""

    d: torch.Tensor
    """W, replaced by W - Q in each column that has been rounded."""
    codes: torch.Tensor
    """uint8, d's shape."""
    scale: torch.Tensor
    """[groups, 1, rows], or along the outputs [n, groups, 1]."""
    zero: torch.Tensor
    """Like scale; the middle code if symmetric, the minimum where the scheme has one."""
    keep: torch.Tensor | None
    """uint8, 1 where a weight may differ from zero."""
    levels: dict[int, kquants.Levels] | None = None
    """For a K-quant the levels of its scales and minima by the number of the super-block; their values are in scale and zero."""

    @property
    def flat(self) -> torch.Tensor:
        return self.d.view(len(self.d), -1)


@dataclass(frozen=True)
class Settings:
    """How the solver works; plain GPTQ is clip="none", signed=False, sweeps=0."""

    clip: Clip = "mse"
    signed: bool = True
    """Whether scales of integers may be negative; scales of floats never are."""
    least_zero: int = 0
    sweeps: int = 1
    """Rounds of coordinate descent after the first pass, which also adjust scales of integers."""
    refit: bool = True
    """Whether scales are fitted to the targets of their group, if columns are rounded in stored order."""
    along: Along = "inputs"


@dataclass(frozen=True)
class Task:
    """The parts of the problem that are the same for all rows."""

    factor: Factor
    h: torch.Tensor
    scheme: Scheme
    dtype: torch.dtype
    settings: Settings
    group: int
    """Columns (along the outputs: rows) that share a scale."""
    fixed: torch.Tensor | None
    """Scales of a grid of floats, for every row: [rows, groups], or along the outputs [n, groups]."""

    @property
    def along(self) -> Along:
        """The direction of groups."""
        return self.settings.along

    @property
    def dim(self) -> int:
        """The dimension of `Rows.d` that a group runs along."""
        return 0 if self.along == "inputs" else 2

    def owners(self, columns: torch.Tensor) -> torch.Tensor:
        """The index in `Rows.scale` of each of `columns`."""
        return columns // self.group if self.along == "inputs" else columns

    @property
    def unit(self) -> int:
        """Columns whose scales are fitted together, along the inputs."""
        return SUPER if self.scheme.scales == "k" else self.group

    def fit(self, part: Rows, ks: slice, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Fits the scales of columns `ks`, along the inputs of one `unit`, to x; `weight` are weights of their errors."""
        to = slice(ks.start // self.group, -(-ks.stop // self.group)) if self.along == "inputs" else ks
        x = x if part.keep is None else x * part.keep[ks]
        if part.levels is not None:
            blocked = kquants.blocked(x[:, 0].T, self.scheme)
            found = kquants.fit(blocked, kquants.blocked(weight, self.scheme), self.scheme, self.settings.clip)
            part.levels[ks.start // SUPER] = found
            part.scale[to, 0] = found.steps().flatten(1).T.to(x.dtype)
            if (lows := found.lows()) is not None:
                part.zero[to, 0] = lows.flatten(1).T.to(x.dtype)
            return
        h, how = weight if self.along == "inputs" else None, self.settings
        part.scale[to], part.zero[to] = fit(x, h, self.dim, self.scheme, self.dtype, how.clip, how.signed, how.least_zero)
