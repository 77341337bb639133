"""Numbers for channels: statistics that add up, AWQ's and SmoothQuant's formulas, what rounding costs."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.smoothing import Activity, Extents, by_activity, by_extents, cost
from compress.spec.scheme import Scheme

W4 = Scheme.parse("w4a16g16")


def test_statistics_are_those_of_all_tokens_at_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    activity, extents = Activity(8), Extents(8)
    for part in (x[:0], x[:20], x[20:]):
        activity.add(part)
        extents.add(part)
    assert activity.tokens == extents.tokens == 50
    torch.testing.assert_close(activity.magnitudes(), x.abs().mean(0))
    torch.testing.assert_close(activity.mean(), x.T @ x / 50)
    assert torch.equal(extents.largest(), x.abs().amax(0))
    # Matrix, magnitudes: what processes add up.
    assert len(Activity(8).parts()) == 2


@pytest.mark.parametrize("kind", [Activity, Extents])
def test_inputs_that_are_not_finite_are_told(kind: type[Activity] | type[Extents]) -> None:
    statistic = kind(2)
    statistic.add(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="not finite"):
        statistic.magnitudes() if isinstance(statistic, Activity) else statistic.largest()


def test_the_formulas() -> None:
    magnitudes = torch.tensor([0.1, 1.0, 10.0, 0.0])
    assert torch.equal(by_activity(magnitudes, 0.0), torch.ones(4))
    s = by_activity(magnitudes, 0.5)
    # Between the largest and the smallest, one is in the middle; a channel of zeros counts as 1e-4.
    assert float(s.max() * s.min()) == pytest.approx(1)
    assert float(s[2] / s[1]) == pytest.approx(10**0.5)
    assert float(s[1] / s[3]) == pytest.approx(100)
    inputs, weights = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.25])
    assert by_extents(inputs, weights, 0.5).tolist() == [2.0, 2.0]
    assert by_extents(inputs, weights, 1.0).tolist() == [4.0, 1.0]


def test_cost_is_the_error_of_outputs_per_token() -> None:
    torch.manual_seed(0)
    w, x, s = torch.randn(8, 32), torch.randn(100, 32), torch.rand(32) + 0.5
    from compress.numerics.rounding import nearest

    rounded = nearest(w * s, W4, torch.float32).q.dequantize()
    wanted = ((x / s) @ rounded.T - x @ w.T).square().sum() / 100
    assert cost(w, s, x.T @ x / 100, W4, torch.float32, "none") == pytest.approx(float(wanted), rel=1e-4)
