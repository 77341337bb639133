"""Stacked experts: rows sorted by expert, some experts with none, against a product for each."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from compress.errors import Refusal
from gpu.cases import DEVICE, DTYPES, RUNNING, SCHEMES, check, inputs, made, twice, weight_of

COUNTS = [[1, 0, 1, 0, 0, 0, 0, 0], [0, 5, 0, 17, 1, 0, 0, 40], [300, 0, 70, 128, 1, 64, 16, 5], [0, 0, 0, 0, 0, 0, 0, 33]]
"""Rows of each expert."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", SCHEMES)
@pytest.mark.parametrize("backend", RUNNING)
def test_each_row_is_multiplied_by_its_experts_matrix(state: str, dtype: str, backend: str) -> None:
    kind = getattr(torch, dtype)
    packed, dense = made(state, 272, 512, kind, experts=len(COUNTS[0]))
    try:
        weight = weight_of(packed, kind, backend)
    except Refusal as refusal:
        pytest.skip(f"{backend}: {refusal.reason}")
    for counts in COUNTS:
        offsets = torch.tensor([0, *counts], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
        x = inputs(packed, sum(counts), kind)
        found = twice(weight.grouped, x, offsets)
        for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
            if start < end:
                check(found[start:end], x[start:end], dense[expert])
