"""Fuse experts: which matrices of experts become one, or one stack.

Experts may lie on disk each by itself, and in states of their own. Those that are alike are stacked; the parts of an expert
that stand one below the other, as gate and up do, become one matrix where tiles can be put together.
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
"""A weight on disk; which matrix of it, if it is a stack."""
Matrix = tuple[Piece, ...]
"""Pieces one below the other."""


@dataclass(frozen=True)
class Kind:
    """What matrices must have in common to be in one stack."""

    state: State | None
    """None: it is not packed."""
    rows: int
    columns: int
    parts: Any = None
    """What else there is to tell."""


def stacks(experts: list[list[Piece]], kind: Callable[[str], Kind]) -> tuple[list[list[Matrix]], list[list[Place]]]:
    """The matrices of each stack; and for each expert the stacks that it is in, and its number there.

    `experts` are the pieces of each, `kind` tells one of a weight on disk.
    """
    alike: dict[tuple[Kind, ...], list[int]] = defaultdict(list)
    for expert, parts in enumerate(experts):
        alike[tuple(kind(source) for source, _ in parts)].append(expert)
    found: list[list[Matrix]] = []
    places: list[list[Place]] = [[] for _ in experts]
    # What is not packed comes first, because its product takes all rows before its own.
    for kinds, members in sorted(alike.items(), key=lambda item: any(kind.state for kind in item[0])):
        matrices = [[tuple(experts[e])] if _join(kinds) else [(piece,) for piece in experts[e]] for e in members]
        for stack in zip(*matrices, strict=True):
            for number, expert in enumerate(members):
                places[expert].append((len(found), number))
            found.append([*stack])
    return found, places


def _join(kinds: tuple[Kind, ...]) -> bool:
    """Whether matrices can become one."""
    state = kinds[0].state
    if len({(kind.state, kind.columns) for kind in kinds}) > 1:
        return False
    if state is None:
        return True
    tiled = not any(kind.rows % ROWS for kind in kinds[:-1]) and state.outliers is None and state.lowrank is None
    return tiled and (state.scheme is None or (by_row(state.scheme) and state.scheme.scales != "e4m3"))


def joined(pieces: list[Packed]) -> Packed:
    """Matrices of one state, whose rows but for the last are whole tiles, as one."""
    if len(pieces) == 1:
        return pieces[0]
    parts = {name: torch.cat([piece.parts[name] for piece in pieces]) for name in pieces[0].parts}
    return replace(pieces[0], rows=sum(piece.rows for piece in pieces), parts=parts)
