"""Blocks: assigns rows of experts to the blocks of a grouped product."""

from __future__ import annotations

import torch


def block_map(offsets: torch.Tensor, rows: int, block: int) -> torch.Tensor:
    """Blocks of up to `block` rows of one expert: int32 [3, B], with the expert, the first row and the number of rows.

    `offsets` int32 [experts + 1] are the first rows of the experts among all `rows`. They stay on their device, and nothing
    waits for it: B = min(rows, experts + rows // block) is always enough, and blocks that are not needed have no rows.
    """
    experts = len(offsets) - 1
    counts = offsets.diff()
    ends = ((counts + block - 1) // block).cumsum(0)
    number = torch.arange(min(rows, experts + rows // block), device=offsets.device)
    expert = torch.searchsorted(ends, number, right=True).clamp(max=experts - 1)
    # Index of a block within its expert; beyond the last one for unneeded blocks, so that they get no rows.
    place = number - torch.where(expert > 0, ends[expert - 1], 0)
    first = offsets[expert] + place * block
    held = (offsets[expert + 1] - first).clamp(0, block)
    return torch.stack([expert, first, held]).to(torch.int32)
