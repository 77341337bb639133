"""Fuse experts: which matrices of experts are joined into one, or stacked.

Experts may be stored separately and in different states. Those of the same kind are stacked; the parts of an expert whose
rows follow each other, such as gate and up, are joined into one matrix if their rows are whole tiles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.kernels.native.modules import Place
from compress.kernels.native.packed import Packed, by_row
from compress.kernels.native.tiles import ROWS
from compress.spec.weight_state import State

Piece = tuple[str, int | None]
"""(a weight on disk, the number of the matrix in it if it is a stack)."""
Matrix = tuple[Piece, ...]
"""Pieces whose rows follow each other."""


@dataclass(frozen=True)
class Kind:
    """The properties that all matrices of a stack share."""

    state: State | None
    """The state; None if the weight is not packed."""
    rows: int
    columns: int
    parts: Any = None
    """Dtypes and shapes of the parts."""


def stacks(experts: list[list[Piece]], kind: Callable[[str], Kind]) -> tuple[list[list[Matrix]], list[list[Place]]]:
    """(the matrices of each stack, for each expert the stacks that it is in and its number in each).

    `experts` are the pieces of each expert; `kind` returns the Kind of a weight on disk.
    """
    alike: dict[tuple[Kind, ...], list[int]] = defaultdict(list)
    for expert, parts in enumerate(experts):
        alike[tuple(kind(source) for source, _ in parts)].append(expert)
    found: list[list[Matrix]] = []
    places: list[list[Place]] = [[] for _ in experts]
    # Unpacked matrices come first, because their product also takes all rows before its own.
    for kinds, members in sorted(alike.items(), key=lambda item: any(kind.state for kind in item[0])):
        matrices = [[tuple(experts[e])] if _join(kinds) else [(piece,) for piece in experts[e]] for e in members]
        for stack in zip(*matrices, strict=True):
            for number, expert in enumerate(members):
                places[expert].append((len(found), number))
            found.append([*stack])
    return found, places


def _join(kinds: tuple[Kind, ...]) -> bool:
    """Whether matrices can be joined into one."""
    state = kinds[0].state
    if len({(kind.state, kind.columns) for kind in kinds}) > 1:
        return False
    if state is None:
        return True
    tiled = not any(kind.rows % ROWS for kind in kinds[:-1]) and state.outliers is None and state.lowrank is None
    return tiled and (state.scheme is None or (by_row(state.scheme) and state.scheme.scales != "e4m3"))


def joined(pieces: list[Packed]) -> Packed:
    """Joins matrices of one state into one; the rows of all but the last must be whole tiles."""
    if len(pieces) == 1:
        return pieces[0]
    parts = {name: torch.cat([piece.parts[name] for piece in pieces]) for name in pieces[0].parts}
    return replace(pieces[0], rows=sum(piece.rows for piece in pieces), parts=parts)
