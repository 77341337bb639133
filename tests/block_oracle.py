"""Whole decoder blocks by a library of CPU kernels, against the same kernels one after another: the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

import integers_oracle
import simd_oracle
from compress.kernels.cpu.library import DTYPES, CBlock, CLinear, CScaled, Library
from compress.kernels.native.integers import rounding
from compress.kernels.native.simd import weight_of
from compress.spec.scheme import Scheme

WIDTH, HEADS, GROUPS, SIZE, INNER = 64, 4, 2, 16, 96
ROOM, COUNT = 8, 6
"""Places of the cache, and how many are taken, the new one among them."""
SCHEMES = ("w4a16g32", "w3a16g32-asym", "nf4g32", "w4a8g32", "w8a8")
SHAPES = {
    "query": (HEADS * SIZE, WIDTH), "key": (GROUPS * SIZE, WIDTH), "value": (GROUPS * SIZE, WIDTH), "output": (WIDTH, HEADS * SIZE),
    "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER),
}  # fmt: skip


def block_differences(library: Library) -> Iterator[str]:
    """What differs, a line each."""
    for dtype in DTYPES:
        for number, text in enumerate(SCHEMES):
            for batch, headed, masked in ((1, False, False), (3, True, True), (14, number % 2 > 0, False)):
                if not _alike(library, Scheme.parse(text), dtype, batch, headed, masked):
                    yield f"{library.isa}: a block in {text}, {dtype}, {batch} texts, norms of heads {headed}, mask {masked}"


def _alike(library: Library, scheme: Scheme, dtype: torch.dtype, batch: int, headed: bool, masked: bool) -> bool:
    prepared = integers_oracle.prepared if scheme.inputs else simd_oracle.prepared
    weights = {name: prepared(scheme, *shape, dtype)[0] for name, shape in SHAPES.items()}
    norms = {
        name: torch.rand(width).to(dtype) + 1
        for name, width in (("first", WIDTH), ("second", WIDTH), ("query", SIZE), ("key", SIZE))
    }
    x, angles = torch.randn(batch, 1, WIDTH).to(dtype), torch.rand(batch, 1, SIZE)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.randn(batch, GROUPS, ROOM, SIZE).to(dtype) for _ in range(2))
    mask = torch.rand(batch, COUNT) > 0.4 if masked else None
    if mask is not None:
        mask[:, -1] = True
    caches = [(keys.clone(), values.clone()) for _ in range(2)]

    out, job = torch.empty_like(x), CBlock(heads=HEADS, groups=GROUPS, size=SIZE, scale=SIZE**-0.5, dtype=DTYPES[dtype])
    for name, packed in weights.items():
        how = ctypes.addressof(rounding(packed)) if scheme.inputs else None
        setattr(job, name, CLinear(ctypes.addressof(weight_of(packed)), None, 96, how))
    for name, weight in norms.items():
        if headed or name in ("first", "second"):
            setattr(job, f"{name}_norm", CScaled(weight.data_ptr(), 1e-6, False))
    job.x, job.out, job.cos, job.sin, job.angles = x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), SIZE
    job.keys, job.values, job.batch, job.count, job.room = caches[0][0].data_ptr(), caches[0][1].data_ptr(), batch, COUNT, ROOM
    job.mask, job.mask_batch = (None, 0) if mask is None else (mask.data_ptr(), COUNT)
    library.blocks([job])

    def multiplied(name: str, given: torch.Tensor) -> torch.Tensor:
        packed, found = weights[name], given.new_empty(batch, SHAPES[name][0])
        if scheme.inputs:
            library.integers(weight_of(packed), rounding(packed), given, None, found)
        else:
            library.product(weight_of(packed), given, None, found)
        return found

    flat = library.norm(x, norms["first"], 1e-6, False).view(batch, WIDTH)
    query, key, value = (multiplied(name, flat) for name in ("query", "key", "value"))
    if headed:
        query, key = (
            library.norm(y.view(-1, SIZE), norms[name], 1e-6, False).view(batch, -1)
            for y, name in ((query, "query"), (key, "key"))
        )
    library.rotary(query, key, cos, sin, SIZE)
    keys, values = caches[1]
    keys[:, :, COUNT - 1], values[:, :, COUNT - 1] = key.view(batch, GROUPS, SIZE), value.view(batch, GROUPS, SIZE)
    attended = library.attend(query.view(batch, HEADS, SIZE), keys[:, :, :COUNT], values[:, :, :COUNT], SIZE**-0.5, mask)
    middle = x.view(batch, WIDTH) + multiplied("output", attended.view(batch, -1))
    flat = library.norm(middle, norms["second"], 1e-6, False)
    meant = middle + multiplied("down", library.gate(multiplied("gate", flat), multiplied("up", flat)))
    return torch.equal(out.view(batch, WIDTH), meant) and all(torch.equal(one, other) for one, other in zip(*caches, strict=True))
