"""Learned rounding: it starts where the codes are, half a step leads to the neighbour, and gradients are those of autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.numerics.floats import decode
from compress.numerics.learned_rounding import LearnedRounding, codes_at, last_place, places, positions, values_at
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.numerics.scales import spread
from compress.spec.scheme import Scheme

SCHEMES = [
    "w2a16g32", "w3a16g32-asym", "w4a16g64", "w5a16", "w8a8", "w4a16g32-min", "nf4g64", "nf2g32", "fp4g32", "fp4g32-m2", "mxfp4",
    "nvfp4", "fp8", "fp8-block", "e3m0g32", "iq4_nl", "q2_k", "q3_k", "q4_k", "q6_k",
]  # fmt: skip


def made(text: str, rows: int = 8, columns: int = 256) -> tuple[torch.Tensor, QTensor]:
    """A weight in fp32, and its codes."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    return w, nearest(w, Scheme.parse(text), torch.float32).q.plain()


def learned(q: QTensor, position: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = LearnedRounding.apply(  # type: ignore[no-untyped-call]
        offset, q.steps(), position, q.zero, q.minimum, q.scheme, torch.float32
    )
    return found


@pytest.mark.parametrize("text", SCHEMES)
def test_without_an_offset_the_codes_are_what_they_were(text: str) -> None:
    w, q = made(text)
    for dense in (w, w + 3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(4)), None):
        position = positions(q, dense)
        torch.testing.assert_close(learned(q, position, torch.zeros_like(w)), q.dequantize(), rtol=0, atol=0)
        i = position.round()
        found = codes_at(i, q.scheme)
        assert torch.equal(replace(q, codes=found).dequantize(), q.dequantize())
        assert torch.equal(places(replace(q, codes=found)), i)


@pytest.mark.parametrize("text", SCHEMES)
def test_half_a_step_leads_to_the_neighbour_on_the_side_of_the_weight(text: str) -> None:
    """For weights in the middle third between two values, whichever of them their code is."""
    w, q = made(text)
    i, scheme = places(q), q.scheme
    last = last_place(scheme, w.device)
    inner = (i > 0) & (i < last)
    value, above, below = (values_at((i + by).clamp(0, last), scheme, q.zero) for by in (0, 1, -1))
    base = 0 if q.minimum is None else spread(q.minimum.float(), scheme, *w.shape)
    step = spread(q.steps(), scheme, *w.shape)
    for toward, sign in ((above, 1), (below, -1)):
        between = base + step * (value + 0.4 * (toward - value))
        moved = (positions(q, between) + sign * 0.2).round()
        assert torch.equal(moved[inner], (i + sign)[inner])
        assert torch.equal((positions(q, between) - sign * 0.2).round()[inner], i[inner])


@pytest.mark.parametrize("text", SCHEMES)
def test_gradients_are_those_of_straight_through_rounding(text: str) -> None:
    """The oracle: autograd through the values on the straight lines between neighbours, and through the scales."""
    w, q = made(text)
    position, scheme = positions(q, w), q.scheme
    last = last_place(scheme, w.device)
    offset = (0.4 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5))).requires_grad_()
    steps = q.steps().clone().requires_grad_()
    out = LearnedRounding.apply(offset, steps, position, q.zero, q.minimum, scheme, torch.float32)  # type: ignore[no-untyped-call]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    out.backward(upstream)

    free = offset.detach().clone().requires_grad_()
    moved = position + free
    i = moved.detach().round().clamp(0, last)
    low = moved.detach().floor().clamp(0, last - 1)
    a, b = (values_at(at, scheme, q.zero) for at in (low, low + 1))
    if scheme.whole:
        a, b = torch.zeros_like(a), torch.ones_like(b)
    line = a + (b - a) * (moved - low)
    line = line + (values_at(i, scheme, q.zero) - line).detach()
    free_steps = q.steps().clone().requires_grad_()
    expected = line * spread(free_steps, scheme, *w.shape)
    if q.minimum is not None:
        expected = expected + spread(q.minimum.float(), scheme, *w.shape)
    torch.testing.assert_close(out.detach(), expected.detach())
    expected.backward(upstream)
    assert offset.grad is not None
    assert free.grad is not None
    inside = (moved.detach() > -0.5) & (moved.detach() < last + 0.5)
    torch.testing.assert_close(offset.grad[inside], free.grad[inside])
    torch.testing.assert_close(steps.grad, free_steps.grad, rtol=1e-4, atol=1e-4)


def test_beyond_the_last_code_an_offset_is_led_back_and_no_further_out() -> None:
    _, q = made("w4a16g64")
    q = replace(q, codes=torch.full_like(q.codes, 15))
    offset = torch.full(q.codes.shape, 0.9).requires_grad_()
    learned(q, positions(q, None), offset).sum().backward()
    assert offset.grad is not None
    assert bool((offset.grad > 0).all()), "a step against it leads back"
    offset.grad = None
    (-learned(q, positions(q, None), offset)).sum().backward()
    assert not offset.grad.any()


@pytest.mark.parametrize("text", ["mxfp4", "nf4g64", "fp8", "e3m0g32"])
def test_places_are_in_the_order_of_values(text: str) -> None:
    scheme = Scheme.parse(text)
    last = last_place(scheme, torch.device("cpu"))
    i = torch.arange(last + 1).float()
    values = values_at(i, scheme, None)
    assert bool((values.diff() > 0).all())
    assert torch.equal(decode(codes_at(i, scheme), scheme), values)
    assert len(values) == {"mxfp4": 15, "nf4g64": 16, "fp8": 253, "e3m0g32": 15}[text]
