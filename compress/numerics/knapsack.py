"""Knapsack: one choice for each item, of least total cost within a budget; exact.

Legend: item i has choices c with cost v_ic and size m_ic; find c_i with the least sum of v and a sum of m of at most B.

Dynamic programming over items keeps the partial sums (size, cost) that no other one beats in both. A partial sum is also
dropped if a lower bound of its total cost exceeds the cost of a known solution. The bound is the relaxed problem, in which
the last item may be divided: along the lower convex hull of its choices an item grows in steps of falling gain per byte,
and the relaxed optimum takes the steps of all items by gain per byte until the budget is spent (Sinha & Zoltners, 1979).
So few sums remain that thousands of items take seconds, whatever the sizes; an optimum is never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

_SLACK = 1e-11
"""Share of all costs together by which rounding may falsify a bound."""


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice of each item. Raises ValueError if even the smallest choices exceed the budget."""
    least = sum(min(m) for m in sizes)
    if least > budget:
        raise ValueError(f"{least} is the least that the choices take, and {budget} is given")
    v = [torch.tensor(list(each), dtype=torch.float64) for each in costs]
    m = [torch.tensor(list(each), dtype=torch.int64) for each in sizes]
    slack = _SLACK * float(sum(each.abs().max() for each in v))
    steps = _Steps.of(costs, sizes)
    size, cost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[torch.Tensor, torch.Tensor]] = []
    best = float(steps.rest(0, budget - size)[1])
    for i in range(len(v)):
        grown = (size + m[i][:, None]).flatten()
        spent = (cost + v[i][:, None]).flatten()
        kept = _unbeaten(grown, spent)
        kept = kept[grown[kept] <= budget]
        # A sum that leaves no room for the other items has an infinite bound.
        relaxed, whole = steps.rest(i + 1, budget - grown[kept])
        best = min(best, float((spent[kept] + whole).min()))
        kept = kept[spent[kept] + relaxed <= best + slack]
        trail.append((kept % len(size), kept // len(size)))
        size, cost = grown[kept], spent[kept]
    at, found = int(cost.argmin()), []
    for before, choice in reversed(trail):
        found.append(int(choice[at]))
        at = int(before[at])
    return found[::-1]


def _unbeaten(size: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Indices, by size, of the sums that are cheaper than all others of at most their size; of equal ones the first."""
    order = cost.argsort(stable=True)
    order = order[size[order].argsort(stable=True)]
    sorted_ = cost[order]
    before = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), sorted_.cummin(0).values[:-1]])
    return order[sorted_ < before]


class _Steps(NamedTuple):
    """Steps along the hulls of all items, by falling gain per byte."""

    item: torch.Tensor
    """int64 [steps]: the item of each step."""
    size: torch.Tensor
    """int64 [steps]: bytes that it adds."""
    cost: torch.Tensor
    """fp64 [steps]: cost that it adds, below 0."""
    least_size: torch.Tensor
    """int64 [items + 1]: sum of the smallest sizes over the items from each on."""
    least_cost: torch.Tensor
    """fp64 [items + 1]: sum of the costs of these choices."""

    @classmethod
    def of(cls, costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> _Steps:
        steps: list[tuple[float, int, int, float]] = []
        starts = []
        for i, (v, m) in enumerate(zip(costs, sizes, strict=True)):
            hull = _hull(sorted(zip(m, v, strict=True)))
            starts.append(hull[0])
            steps += [((b[1] - a[1]) / (b[0] - a[0]), i, b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]
        # The steps of one item stay in order, because gains fall along a convex hull.
        steps.sort(key=lambda step: step[0])
        columns = list(zip(*steps, strict=True)) or [(), (), (), ()]
        return cls(
            torch.tensor(columns[1], dtype=torch.int64), torch.tensor(columns[2], dtype=torch.int64),
            torch.tensor(columns[3], dtype=torch.float64), _from_each([m for m, _ in starts], torch.int64),
            _from_each([v for _, v in starts], torch.float64),
        )  # fmt: skip

    def rest(self, start: int, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Costs of the items from `start` on within `room` int64 [n]: (lower bound of the relaxed problem, a feasible one)."""
        mine = self.item >= start
        zero = torch.zeros(1, dtype=torch.int64)
        size = torch.cat([zero, self.size[mine].cumsum(0)])
        cost = torch.cat([zero.double(), self.cost[mine].cumsum(0)]) + self.least_cost[start]
        room = room - self.least_size[start]
        at = (torch.searchsorted(size, room, right=True) - 1).clamp(min=0)
        after = (at + 1).clamp(max=len(size) - 1)
        share = (room - size[at]) / (size[after] - size[at]).clamp(min=1)
        relaxed = cost[at] + share * (cost[after] - cost[at])
        impossible = torch.where(room < 0, torch.inf, 0.0)
        return relaxed + impossible, cost[at] + impossible


def _hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of (size, cost), from the smallest on as long as the cost falls; points by size, then cost."""
    hull: list[tuple[int, float]] = []
    for m, v in points:
        if hull and v >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (m0, v0), (m1, v1) = hull[-2:]
            if (v - v1) * (m1 - m0) > (v1 - v0) * (m - m1):
                break
            hull.pop()
        hull.append((m, v))
    return hull


def _from_each(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
    """Sums of the values from each index on, and 0 at the end."""
    zero = torch.zeros(1, dtype=dtype)
    return torch.cat([torch.tensor(values, dtype=dtype).flip(0).cumsum(0).flip(0), zero])
