"""Outliers: the largest entries, bit by bit; what is left is rounded as if they were not there."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.gptq import solve
from compress.numerics.gptq_task import Settings
from compress.numerics.hessian import Hessian, factor
from compress.numerics.outliers import gather, split
from compress.numerics.rounding import nearest
from compress.spec.corrections import Outliers
from compress.spec.scheme import Scheme

SCHEMES = ["w2a16g16-asym", "w3a16g16", "nf4g16", "fp4g16", "fp8", "mxfp4"]


def spiky(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) ** 3).bfloat16()


@pytest.mark.parametrize("shape", [(1, 8), (7, 40), (3, 16, 40), (40, 70000)])
@pytest.mark.parametrize("share", [0.0005, 0.02, 0.5])
def test_the_largest_are_taken_out_bit_by_bit(shape: tuple[int, ...], share: float) -> None:
    w = spiky(*shape)
    rest, mask, sparse = split(w, Outliers(share))
    count = round(share * shape[-2] * shape[-1])
    assert sparse.values.shape == sparse.columns.shape == (*shape[:-2], count)
    assert sparse.columns.dtype == (torch.uint16 if shape[-1] <= 65536 else torch.int32)
    assert torch.equal(sparse.put(rest.clone()), w)
    assert torch.equal(sparse.clear(w.clone()), rest)
    for own, kept in zip(w.view(-1, *shape[-2:]), mask.view(-1, *shape[-2:]), strict=True):
        assert int(kept.sum()) == count
        assert not count or own[kept].abs().min() >= own[~kept].abs().max()


def test_of_equal_entries_the_first_are_taken() -> None:
    assert split(torch.ones(3, 4), Outliers(0.5)).mask.flatten().tolist() == [True] * 6 + [False] * 6


def test_rows_are_taken_in_any_order() -> None:
    w = spiky(9, 33)
    sparse, rows = split(w, Outliers(0.1)).sparse, torch.tensor([4, 4, 0, 8])
    assert torch.equal(sparse.take(rows).put(torch.zeros(4, 33)), sparse.put(torch.zeros(9, 33))[rows])


@pytest.mark.parametrize("text", SCHEMES)
def test_scales_shrink_and_the_error_is_that_of_the_rest(text: str) -> None:
    scheme, w = Scheme.parse(text), spiky(24, 64)
    plain, found = nearest(w, scheme, w.dtype), nearest(w, scheme, w.dtype, outliers=Outliers(0.02))
    assert bool((found.q.steps() <= plain.q.steps()).all())
    assert found.squared_error < plain.squared_error
    meant = found.q.dequantize()
    assert found.q.outliers is not None
    kept = split(w, Outliers(0.02)).mask
    assert torch.equal(meant[kept], w[kept].float())
    assert found.squared_error == pytest.approx(float((meant - w.float()).square().sum()), rel=1e-5)
    assert found.squared_norm == pytest.approx(float(w.float().square().sum()), rel=1e-5)
    assert torch.equal(found.q.nonzero(), meant != 0)
    # What lies under an outlier means nothing.
    other = torch.where(kept, torch.randint(0, scheme.levels - 1, w.shape, dtype=torch.uint8), found.q.codes)
    changed = type(found.q)(scheme, other, found.q.scale, found.q.zero, None, found.q.outliers)
    assert torch.equal(changed.dequantize(), meant)


ORIGINAL = torch.randn(6, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3


def least_loss(w: torch.Tensor, h: torch.Tensor, scheme: Scheme, mask: torch.Tensor) -> torch.Tensor:
    """The first pass from targets t_k = w_k + sum_(j<k) d_j F_jk, where d is zero for entries that stay."""
    ridge = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    r = torch.linalg.cholesky(ridge.flip(0, 1)).flip(0, 1)
    f, d, q = r / r.diagonal(), torch.zeros_like(w), torch.zeros_like(w)
    # Grids are in fp32, whatever is computed with them.
    scale = (w.masked_fill(mask, 0).abs().amax(1) * 2 / (scheme.levels - 1)).float().double()
    for k in range(w.shape[1]):
        target = w[:, k] + d[:, :k] @ f[:k, k]
        coded = (target / scale).round().clamp(-scheme.middle, scheme.middle - 1) * scale
        q[:, k] = torch.where(mask[:, k], w[:, k], coded)
        d[:, k] = w[:, k] - q[:, k]
    return q


def test_gptq_leaves_them_as_they_are_and_rounds_the_rest_around_them() -> None:
    x = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    statistic = Hessian(24, torch.float64)
    statistic.add(x)
    h, scheme = statistic.mean(), Scheme.parse("w3a16")
    rest, mask, _ = split(ORIGINAL, Outliers(0.05))
    found = solve(rest, factor(h), h, scheme, torch.float64, Settings(clip="none", signed=False, sweeps=0), mask=~mask)
    ours = (found.codes.double() - scheme.middle) * found.scale
    assert not bool(ours[mask].any())
    torch.testing.assert_close(torch.where(mask, ORIGINAL, ours), least_loss(ORIGINAL, h, scheme, mask), rtol=0, atol=1e-6)


def test_gathered_entries_come_back() -> None:
    w = torch.arange(12.0).view(3, 4)
    mask = w > 6
    assert gather(w, mask).offsets.tolist() == [0, 0, 1, 5]
    assert torch.equal(gather(w, mask).put(torch.zeros(3, 4)), w * mask)
