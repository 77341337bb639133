"""LoftQ: what falls in every round, what does not, and what is kept."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from compress.numerics.loftq import alternate
from compress.numerics.lowrank import best, stored
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest, on_grid
from compress.spec.corrections import Lowrank
from compress.spec.scheme import Scheme

SCHEMES = ["nf4g64", "nf2g64", "w4a16g64", "w2a16g64-asym", "fp4g64", "mxfp4", "fp8"]


def rounding(text: str) -> partial[QTensor]:
    return partial(lambda scheme, w: nearest(w, scheme, torch.float32).q, Scheme.parse(text))


@pytest.mark.parametrize("text", SCHEMES)
def test_it_is_the_loop_of_the_paper(text: str) -> None:
    w, lowrank, product = torch.randn(48, 128), Lowrank(6), torch.zeros(48, 128)
    found, rounded = alternate(w, rounding(text), lowrank, 4, keep_best=False), rounding(text)
    for residual in found.residuals:
        q = rounded(w - product)
        s = torch.linalg.svdvals(w - q.dequantize())
        product = stored(*best(w - q.dequantize(), 6), lowrank).product()
        assert residual == pytest.approx(float((w - q.dequantize() - product).square().sum()), rel=1e-5)
        # The tail, but for the rounding of factors to bf16.
        assert residual == pytest.approx(float(s[6:].square().sum()), rel=1e-3)
        assert residual <= float(s.square().sum())
    assert torch.equal(found.q.codes, q.codes)
    assert float((w - found.q.dequantize()).square().sum()) == pytest.approx(found.residuals[-1], rel=1e-4)


@pytest.mark.parametrize("text", SCHEMES)
def test_with_frozen_scales_no_round_does_harm(text: str) -> None:
    found = alternate(torch.randn(96, 192), rounding(text), Lowrank(8), 12, frozen=True)
    pairs = zip(found.residuals, found.residuals[1:], strict=False)
    assert all(after <= before * (1 + 1e-4) for before, after in pairs)


def test_with_fitted_scales_two_bits_go_up_and_the_best_round_is_kept() -> None:
    w = torch.randn(256, 256)
    found = alternate(w, rounding("nf2g64"), Lowrank(16), 12)
    assert any(after > before for before, after in zip(found.residuals, found.residuals[1:], strict=False))
    assert float((w - found.q.dequantize()).square().sum()) == pytest.approx(min(found.residuals), rel=1e-4)
    last = alternate(w, rounding("nf2g64"), Lowrank(16), 12, keep_best=False)
    assert last.residuals == found.residuals
    assert float((w - last.q.dequantize()).square().sum()) == pytest.approx(found.residuals[-1], rel=1e-4)


@pytest.mark.parametrize("text", SCHEMES)
def test_best_is_no_worse_than_one_round_which_is_no_worse_than_rounding(text: str) -> None:
    w = torch.randn(64, 128)
    found, plain = alternate(w, rounding(text), Lowrank(8), 5), rounding(text)(w)
    one = alternate(w, rounding(text), Lowrank(8), 1)
    # The codes of rounding, with the factors of what it lost: LoRC.
    assert torch.equal(one.q.codes, plain.codes)
    assert one.q.lowrank is not None
    assert torch.equal(one.q.lowrank.left, stored(*best(w - plain.dequantize(), 8), Lowrank(8)).left)
    assert min(found.residuals) <= one.residuals[0] == found.residuals[0] <= float((w - plain.dequantize()).square().sum())


@pytest.mark.parametrize("text", [*SCHEMES, "w3a16", "w8a16g64-asym", "nf3g64", "e3m0g64"])
def test_rounding_what_codes_mean_gives_the_same_codes(text: str) -> None:
    q = rounding(text)(torch.randn(32, 128))
    assert torch.equal(on_grid(q.dequantize(), q).codes, q.codes)
    if text.startswith("nf"):
        again = rounding(text)(q.dequantize())
        assert torch.equal(again.scale, q.scale)
        assert torch.equal(again.codes, q.codes)


def test_on_a_grid_every_entry_takes_the_nearest_value() -> None:
    w, q = torch.randn(4, 32), rounding("nf3g16")(torch.randn(4, 32))
    found = on_grid(w, q).dequantize().view(4, 2, 16)
    values = torch.tensor([-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1])
    choices = (q.scale[..., None] * values)[:, :, None]
    nearest_ = (choices - w.view(4, 2, 16, 1)).abs().amin(-1)
    torch.testing.assert_close((found - w.view(4, 2, 16)).abs(), nearest_, rtol=0, atol=1e-3)


def test_ratios_to_rounding_are_those_of_the_reference() -> None:
    """512 x 512 Gaussian, NF4 in blocks of 64, rank 16."""
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    lost = float((w - rounding("nf4g64")(w).dequantize()).square().sum())
    found = alternate(w, rounding("nf4g64"), Lowrank(16), 5)
    for rounds, ratio in {1: 0.942, 2: 0.898, 5: 0.855}.items():
        assert (found.residuals[rounds - 1] / lost) ** 0.5 == pytest.approx(ratio, abs=0.004)
