"""QTensor: codes with outliers and factors have the bytes that are declared, and mean what the formula says."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import qtensor
from compress.numerics.rounding import stacked, unstacked
from compress.spec.weight_state import State
from support import in_state, linear

PLACES = {
    "linear": linear((48, 96)), "conv1d": linear((64, 96), transposed=True, module_class="Conv1D"),
    "fused": linear((3, 48, 64), kind="expert"), "fused, turned": linear((3, 64, 48), kind="expert", transposed=True),
    "wide": linear((2, 70000)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", ["codes(w3a16g32-asym)+outliers(0.02)", "codes(w5a16g16-min)+outliers(0.02)+lowrank(r2)", "codes(nf4g16)+lowrank(r5)",
                                  "codes(fp8)+outliers(0.001)+lowrank(r2-int8)"])  # fmt: skip
def test_bytes_are_declared_and_come_back(text: str, place: str) -> None:
    weight, state = PLACES[place], State.parse(text)
    q = in_state(weight, state)
    tensors = qtensor.encode(weight, q)
    assert {s.name: (s.shape, s.nbytes) for s in qtensor.specs(weight, state)} == {
        n: (tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()
    }
    back = qtensor.decode(weight, state, tensors)
    assert torch.equal(back.dequantize(), q.dequantize())
    if weight.experts is not None:
        assert torch.equal(torch.stack([part.dequantize() for part in unstacked(back)]), q.dequantize())
        assert torch.equal(stacked(unstacked(back)).dequantize(), q.dequantize())


def test_outliers_replace_and_factors_are_added() -> None:
    weight, state = linear((20, 32)), State.parse("codes(w2a16g16)+outliers(0.05)+lowrank(r3)")
    q = in_state(weight, state)
    assert q.outliers is not None
    assert q.lowrank is not None
    for i in range(20):
        entries = range(int(q.outliers.offsets[i]), int(q.outliers.offsets[i + 1]))
        kept = {int(q.outliers.columns[n]): float(q.outliers.values[n]) for n in entries}
        for j in range(32):
            coded = float(q.scale[i, j // 16]) * (int(q.codes[i, j]) - 2)
            added = sum(float(q.lowrank.left[i, k]) * float(q.lowrank.right[k, j]) for k in range(3))
            assert float(q.dequantize()[i, j]) == pytest.approx(kept.get(j, coded) + added, abs=1e-4)


def test_bits_are_those_of_the_parts() -> None:
    """b + scale and zero + values and indices + offsets, and 16 r (rows + columns) of factors."""
    weight, state = linear((256, 1024)), State.parse("codes(w2a16g128-asym)+outliers(0.005)+lowrank(r8)")
    bits = 8 * sum(spec.nbytes for spec in qtensor.specs(weight, state)) / weight.numel
    kept = round(0.005 * weight.numel)
    assert bits == pytest.approx(2 + 24 / 128 + (kept * 32 + 257 * 32 + 16 * 8 * (256 + 1024)) / weight.numel, rel=1e-12)
