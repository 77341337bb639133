"""Codes with a minimum against an element-by-element oracle, and what only they can mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.numerics import minimum, qtensor, rescale
from compress.numerics.grid import dequantize, round_to_nearest
from compress.numerics.loftq import alternate
from compress.numerics.rounding import nearest, on_grid
from compress.spec.corrections import Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from support import linear


def oracle(row: list[float], scheme: Scheme, dtype: torch.dtype) -> list[float]:
    """What the codes of a row mean, a group at a time, in float64 but for what is stored."""
    group, top = scheme.group or len(row), scheme.levels - 1
    found = []
    for part in (row[start : start + group] for start in range(0, len(row), group)):
        low, high = min(part), max(part)
        s = float(torch.tensor((high - low) / top or 1.0, dtype=torch.float32).to(dtype))
        middle = low if low == high else (low + high) / 2 - s * top / 2
        m = float(torch.tensor(middle, dtype=torch.float32).to(dtype))
        found += [s * min(max(round((x - m) / s), 0), top) + m for x in part]
    return found


@pytest.mark.parametrize("text", ["w2a16g32-min", "w4a16g32-min", "w6a16g40-min", "w8a16-min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_equals_the_oracle(text: str, dtype: torch.dtype) -> None:
    scheme, w = Scheme.parse(text), (torch.randn(6, 96, generator=torch.Generator().manual_seed(1)) + 0.3).to(dtype)
    w[2] = 0.375
    q = nearest(w, scheme, dtype).q
    assert q.zero is None
    assert q.minimum is not None
    assert (q.minimum.dtype, q.minimum.shape) == (dtype, q.scale.shape)
    step = q.scale.float().repeat_interleave(scheme.group or 96, 1)[:, :96]
    lost = (q.dequantize() - torch.tensor([oracle(row, scheme, dtype) for row in w.double().tolist()])).abs()
    # A weight halfway between two codes may fall to either side.
    assert bool((lost <= step * 1.001).all())
    assert float((lost > step * 0.01).float().mean()) < 0.02
    assert torch.equal(q.dequantize()[2], torch.full((96,), 0.375))


def test_values_are_scale_times_code_plus_minimum() -> None:
    q = nearest(torch.randn(3, 16, 64).bfloat16(), Scheme.parse("w5a16g32-min"), torch.bfloat16).q
    assert q.minimum is not None
    for e, i, j in ((0, 0, 0), (1, 7, 33), (2, 15, 63)):
        s, m = (float(part[e, i, j // 32]) for part in (q.scale, q.minimum))
        assert float(q.dequantize()[e, i, j]) == pytest.approx(s * int(q.codes[e, i, j]) + m, rel=1e-6)


def test_no_code_is_zero_unless_its_value_is() -> None:
    w = torch.rand(4, 32) + 1
    w[1], w[2, 5] = 0, 0
    q = nearest(w, Scheme.parse("w4a16-min"), torch.float32).q
    assert torch.equal(q.nonzero(), q.dequantize() != 0)
    assert bool(q.nonzero()[0].all())
    assert not bool(q.nonzero()[1].any())


def test_ranges_away_from_zero_get_finer_steps_than_with_zero_points() -> None:
    w = torch.randn(32, 128) * 0.02 + 0.1
    lost = [nearest(w, Scheme.parse(f"w3a16g32{kind}"), torch.bfloat16).error for kind in ("", "-asym", "-min")]
    assert lost[2] < 0.7 * min(lost[:2])
    assert nearest(w, Scheme.parse("w3a16g32-min"), torch.bfloat16, "mse").error < 0.97 * lost[2]


@pytest.mark.parametrize("dim", [0, 2])
def test_weighted_search_is_never_worse_than_the_range(dim: int) -> None:
    scheme, x = Scheme.parse("w2a16-min"), torch.randn(32, 3, 32).pow(3)
    h = torch.rand(32, 1, 1) if dim == 0 else None

    def error(clip: str) -> torch.Tensor:
        s, m = minimum.fit(x, h, dim, scheme, torch.bfloat16, clip)
        lost = (minimum.codes(x, s, m, scheme) * s + m - x).square() * (1 if h is None else h)
        assert torch.equal(s, s.bfloat16().float())
        assert torch.equal(m, m.bfloat16().float())
        return lost.sum(dim)

    assert bool((error("mse") <= error("none") * (1 + 1e-5)).all())
    assert float(error("mse").sum()) < 0.8 * float(error("none").sum())


def test_outliers_replace_codes_and_leave_the_error_to_the_rest() -> None:
    w, scheme = (torch.randn(20, 64) + 2).bfloat16(), Scheme.parse("w2a16g16-min")
    found = nearest(w, scheme, torch.bfloat16, outliers=Outliers(0.05))
    lost = (found.q.dequantize() - w.float()).square().sum()
    assert found.squared_error == pytest.approx(float(lost), rel=1e-4)
    assert found.squared_norm == pytest.approx(float(w.float().square().sum()), rel=1e-4)


def test_loftq_keeps_a_frozen_grid() -> None:
    w, scheme = torch.randn(24, 64), Scheme.parse("w2a16g32-min")
    made = alternate(w, lambda part: nearest(part, scheme, torch.float32).q, Lowrank(4), 4, frozen=True)
    assert made.residuals == sorted(made.residuals, reverse=True)
    first = nearest(w, scheme, torch.float32).q
    assert torch.equal(on_grid(w, first).codes, first.codes)
    assert made.q.minimum is not None
    assert first.minimum is not None
    assert torch.equal(made.q.minimum, first.minimum)


def test_parts_on_disk() -> None:
    weight, state = linear((48, 96)), State.parse("codes(w6a16g32-min)")
    assert {name: (kind, shape) for name, (kind, shape) in qtensor.part_specs(weight, state).items()} == {
        "codes": ("U8", (48, 72)), "scale": ("BF16", (48, 3)), "minimum": ("BF16", (48, 3)),
    }  # fmt: skip


def test_scale_and_minimum_move_to_the_optimum_of_the_damped_loss() -> None:
    """Against the normal equations in float64, row by row."""
    n, rows = 24, 5
    a = torch.randn(n, n, dtype=torch.float64)
    a, w = a @ a.T + torch.eye(n), torch.randn(n, rows, dtype=torch.float64)
    s, m = torch.rand(rows, dtype=torch.float64) + 0.1, torch.randn(rows, dtype=torch.float64)
    c, e = torch.randint(0, 8, (n, rows)).double(), (torch.rand(n, rows) < 0.8).double()
    c = c * e
    d = w - s * c - m * e
    before, slope = ((a @ d) * d).sum(0), a @ d
    fall = rescale.scale_and_minimum(s, m, torch.float64, c, e, d, slope, a)
    for row in range(rows):
        basis = torch.stack([c[:, row], e[:, row]], 1)
        best = torch.linalg.solve(basis.T @ a @ basis, basis.T @ a @ w[:, row])
        if best[0] * s[row] > 0:
            assert torch.stack([s[row], m[row]]).tolist() == pytest.approx(best.tolist(), rel=1e-9)
    torch.testing.assert_close(d, w - s * c - m * e)
    torch.testing.assert_close(slope, a @ d)
    torch.testing.assert_close(before - ((a @ d) * d).sum(0), fall)


def test_schemes_differ_by_their_minimum_alone() -> None:
    scheme = Scheme.parse("w4a16g32-min")
    assert not scheme.zeros
    assert replace(scheme, minimum=False) == Scheme.parse("w4a16g32-asym")
    found = round_to_nearest(torch.randn(4, 64), scheme, torch.float16)
    assert found.zero is not None
    assert found.zero.dtype == torch.float16
    assert torch.equal(dequantize(found.codes, found.scale, found.zero, scheme).isfinite(), torch.ones(4, 64).bool())
