"""Sparse: stores a 2:4 weight without the half of it that is zero.

Legend: N rows, K columns, a multiple of 4. Two of each aligned four columns are kept, at the first pair of positions that covers
all non-zeros. Kept entry j (of K / 2) of a row is in column 4 (j // 2) + its position, a number of two bits. P planes of
32 kept entries make a chunk: P = 4 for codes of 4 bits, 1 for values; C = ceil(K / 64P) chunks, T = ceil(N / 16) tiles of rows.

    tiles    int16 [experts?, T, C, 16, 32]     kept codes, as tiles.py has those of a matrix of K / 2 columns
    tiles    a float dtype, in that shape       kept values: [n // 16, c, n % 16, r] is kept entry [n, 32c + r]
    indices  int16 [experts?, T, C, 16, 4P]     bits 2i, 2i + 1 of [n // 16, c, n % 16, Pt + p] are the position of
                                                kept entry [n, 32 (Pc + p) + 8t + i], i < 8

So a plane is 64 neighbouring columns, a lane that owns the words 8t .. 8t + 7 of tiles owns the P neighbouring words of their
positions, and four bits are what `mma.sp` takes for four columns, the lower position first. Padding beyond N and K is zero bits
in tiles, and positions 0 and 1, since a pair must have two. A kept zero keeps its sign; the others are read back as +0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations

import torch
from torch.nn.functional import pad

from compress.kernels.native import tiles
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import FLOATS, MATRICES, State, Weight

PATTERN = Sparsity(kept=2, of=4)
_OTHER = f"its pattern is not {PATTERN}"
_BITS = 4
_LEAST_GROUP = 32
"""Columns that one sparse product of matrix units takes."""
_FIRST = 0b0100
"""The pair of positions 0 and 1."""
_CROWDED = 0xFF
"""Marks, instead of a pair, that more than two of four are not zero."""
_CHUNK = 1 << 20
"""Entries processed at a time."""


class Crowded(ValueError):  # noqa: N818 (the caller adds the weight's name)
    """More than two of an aligned four are not zero; `place` is a text that says where."""

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(place)


def chunk(coded: bool) -> int:
    """Columns of a chunk, 64P."""
    return 2 * (tiles.chunk(_BITS) if coded else tiles.WORDS)


def specs(weight: Weight, state: State) -> dict[str, tuple[str, tuple[int, ...]]]:
    """safetensors dtype and shape of tiles and indices."""
    coded = state.scheme is not None
    lead = () if weight.experts is None else (weight.experts,)
    lead = (*lead, -(-weight.rows // tiles.ROWS), -(-weight.columns // chunk(coded)), tiles.ROWS)
    return {"tiles": ("I16" if coded else weight.dtype, (*lead, tiles.WORDS)), "indices": ("I16", (*lead, chunk(coded) // 16))}


def stays(weight: Weight, state: State) -> str:
    """Why a weight is stored with all of its zeros; empty if half of it can be left out."""
    scheme = state.scheme
    if state.sparsity != PATTERN:
        return _OTHER
    if weight.transposed and weight.experts is None:
        return "a Conv1D's pattern runs down its columns"
    if weight.columns % 4:
        return f"4 does not divide its {weight.columns} columns"
    if state.beside():
        return "something stands beside its codes"
    if scheme is not None:
        if not (scheme.integer and scheme.symmetric and scheme.bits == _BITS):
            return f"its codes are {scheme}, and not symmetric w4"
        if scheme.group is not None and scheme.group < _LEAST_GROUP:
            return f"its groups of {scheme.group} columns are less than a sparse product takes"
    elif weight.dtype not in FLOATS or weight.kind not in MATRICES or len(weight.shape) not in (2, 3):
        return "it is no matrix of floats that activations are multiplied by"
    elif weight.kind != "expert" and (weight.converted or weight.attribute != "weight"):
        return "transformers changes it while loading, or has it where nothing packed can be put"
    return ""


def pack(entries: torch.Tensor, zero: int) -> dict[str, torch.Tensor]:
    """Tiles and indices of uint8 codes or float values [experts?, N, K]; `zero` is the code or value of zero. Raises Crowded."""
    kept = entries.new_empty(*entries.shape[:-1], entries.shape[-1] // 2)
    pairs = torch.empty(*entries.shape[:-1], entries.shape[-1] // 4, dtype=torch.uint8)
    flat = [whole.reshape(-1, whole.shape[-1]) for whole in (entries, kept, pairs)]
    for given, halves, found in zip(*(whole.split(max(1, _CHUNK // entries.shape[-1])) for whole in flat), strict=True):
        fours = given.unflatten(1, (-1, 4))
        held = (fours != zero).to(torch.uint8)
        found.copy_(_pairs()[(held[..., 0] | held[..., 1] << 1 | held[..., 2] << 2 | held[..., 3] << 3).int()])
        halves.copy_(given.gather(1, _columns(found)))
    if len(where := (pairs == _CROWDED).nonzero()[:1]):
        *outer, row, four = where[0].tolist()
        raise Crowded(f"{f'expert {outer[0]}, ' if outer else ''}row {row}, columns {4 * four} to {4 * four + 3}")
    coded = entries.dtype == torch.uint8
    return {"tiles": tiles.pack(kept, _BITS) if coded else _tile(kept), "indices": _indices(pairs, chunk(coded))}


def unpack(parts: Mapping[str, torch.Tensor], rows: int, columns: int, zero: int) -> torch.Tensor:
    """The inverse of `pack`, of matrices [experts?, rows, columns]."""
    held = parts["tiles"]
    dtype = torch.uint8 if held.dtype == torch.int16 else held.dtype
    out = torch.empty(*held.shape[:-4], rows, columns, dtype=dtype, device=held.device)
    step = tiles.ROWS * max(1, _CHUNK // (tiles.ROWS * columns))
    stacks = (part.reshape(-1, *part.shape[-4:]) for part in (held, parts["indices"]))
    for kept, indices, matrix in zip(*stacks, out.view(-1, rows, columns), strict=True):
        for start in range(0, rows, step):
            some = slice(start, min(rows, start + step))
            matrix[some] = take({"tiles": kept, "indices": indices}, some, columns, zero)
    return out


def take(parts: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, columns: int, zero: int) -> torch.Tensor:
    """Some rows [n, columns] of a matrix, codes or values; `rows` as `tiles.by_rows` takes them."""
    held = tiles.by_rows(parts["tiles"], rows)
    kept = (tiles.split(held, _BITS) if held.dtype == torch.int16 else held).flatten(1)
    # By planes, [n, C, P, 4], like the kept entries.
    places = tiles.by_rows(parts["indices"], rows).unflatten(-1, (4, -1)).transpose(-1, -2).flatten(1)
    return spread(kept, places, zero)[:, :columns]


def spread(kept: torch.Tensor, places: torch.Tensor, zero: int) -> torch.Tensor:
    """Kept entries [n, K / 2] and words of their positions int16 [n, K / 16], both in plain order -> [n, K]."""
    pairs = torch.stack([places >> shift & 0xF for shift in (0, 4, 8, 12)], -1).flatten(1)
    return kept.new_full((len(kept), 2 * kept.shape[1]), zero).scatter_(1, _columns(pairs), kept)


def sound(indices: torch.Tensor) -> bool:
    """Whether all pairs are two different positions, the lower one first."""
    return all(bool((((indices >> shift) & 3) < ((indices >> (shift + 2)) & 3)).all()) for shift in (0, 4, 8, 12))


@lru_cache(maxsize=1)
def _pairs() -> torch.Tensor:
    """For each set of non-zero columns among four, in bits, the first pair of positions that covers it: uint8 [16]."""
    pairs = [*combinations(range(4), 2)]
    covering = ([pair for pair in pairs if not held & ~(1 << pair[0] | 1 << pair[1])] for held in range(16))
    return torch.tensor([_CROWDED if not found else found[0][0] | found[0][1] << 2 for found in covering], dtype=torch.uint8)


def _columns(pairs: torch.Tensor) -> torch.Tensor:
    """Pairs [n, K / 4] -> the columns of kept entries, int64 [n, K / 2]."""
    fours = 4 * torch.arange(pairs.shape[1], device=pairs.device)
    return torch.stack([fours + (pairs & 3), fours + (pairs >> 2 & 3)], -1).flatten(1)


def _tile(kept: torch.Tensor) -> torch.Tensor:
    """Kept values [experts?, N, K / 2] -> tiles [experts?, T, C, 16, 32]."""
    padded = pad(kept, (0, -kept.shape[-1] % tiles.WORDS, 0, -kept.shape[-2] % tiles.ROWS))
    found: torch.Tensor = padded.unflatten(-1, (-1, tiles.WORDS)).unflatten(-3, (-1, tiles.ROWS)).transpose(-2, -3).contiguous()
    return found


def _indices(pairs: torch.Tensor, columns: int) -> torch.Tensor:
    """Pairs [experts?, N, K / 4] -> indices, with chunks of `columns` columns."""
    padded = pad(pairs, (0, -pairs.shape[-1] % (columns // 4), 0, -pairs.shape[-2] % tiles.ROWS), value=_FIRST)
    four = padded.unflatten(-1, (-1, 4)).to(torch.int32)
    words = (four[..., 0] | four[..., 1] << 4 | four[..., 2] << 8 | four[..., 3] << 12).to(torch.int16)
    # The words of a lane become neighbours: [..., N, C, P, 4] -> [..., N, C, 4P].
    ordered = words.unflatten(-1, (-1, columns // 64, 4)).transpose(-1, -2).flatten(-2)
    found: torch.Tensor = ordered.unflatten(-3, (-1, tiles.ROWS)).transpose(-2, -3).contiguous()
    return found
