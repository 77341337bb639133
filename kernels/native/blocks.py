"""Blocks: which expert's rows each block of a grouped product multiplies."""

from __future__ import annotations

import torch


def block_map(offsets: torch.Tensor, rows: int, block: int) -> torch.Tensor:
    """Blocks of up to `block` rows, each of one expert: int32 [3, B], their expert, first row, and number of rows.

    `offsets` int32 [experts + 1] tell where each expert's rows begin among all `rows`. It stays on its device, and nothing
    waits for it: B = min(rows, experts + rows // block) is enough however rows are spread, and those left over have none.
    """
    experts = len(offsets) - 1
    counts = offsets.diff()
    ends = ((counts + block - 1) // block).cumsum(0)
    number = torch.arange(min(rows, experts + rows // block), device=offsets.device)
    expert = torch.searchsorted(ends, number, right=True).clamp(max=experts - 1)
    # Of the blocks of its expert; beyond the last one for those left over, so that no row is left for them.
    place = number - torch.where(expert > 0, ends[expert - 1], 0)
    first = offsets[expert] + place * block
    held = (offsets[expert + 1] - first).clamp(0, block)
    return torch.stack([expert, first, held]).to(torch.int32)
