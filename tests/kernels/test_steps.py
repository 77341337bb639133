"""What lies between products of a few tokens: norms, rotations, mixed inputs, gated products; against torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from compress.kernels.cpu.library import Library, library
from compress.kernels.native.rotate_inputs import mixed
from compress.numerics.input_rotation import rotated as mixed_in_blocks
from compress.spec.scheme import ROTATED
from simd_oracle import ROUNDING, USABLE, at_the_end_of_a_page


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float, plus_one: bool) -> torch.Tensor:
    """As Llama's norm, or as Gemma's."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * (1 + weight.float())).to(x.dtype) if plus_one else weight * wide.to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, size] by angles [batch or 1, 1, size]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@pytest.fixture(params=USABLE)
def runs(request: pytest.FixtureRequest) -> Library:
    return Library(library().path, request.param)


def close(found: torch.Tensor, meant: torch.Tensor, times: float = 2) -> None:
    torch.testing.assert_close(found, meant, rtol=times * ROUNDING[found.dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 576), (3, 1, 37), (2, 5, 16), (1, 3)])
def test_norms(runs: Library, shape: tuple[int, ...], plus_one: bool, dtype: torch.dtype) -> None:
    for scale in (1.0, 1e-3, 100.0):
        (x, _), (weight, _) = (at_the_end_of_a_page(torch.randn(of).to(dtype) * scale) for of in (shape, shape[-1:]))
        close(runs.norm(x, weight, 1e-5, plus_one), normed(x, weight, 1e-5, plus_one), 8)
    x[..., 0] = torch.nan
    assert runs.norm(x, weight, 1e-5, plus_one).isnan().all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("batch", "heads", "groups", "size"), [(1, 9, 3, 64), (3, 4, 1, 48), (2, 2, 2, 6)])
def test_rotations_are_the_same_bits(runs: Library, batch: int, heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    for texts in (1, batch):
        angle = torch.randn(texts, 1, size)
        (cos, _), (sin, _) = (at_the_end_of_a_page(turn(angle).to(dtype)) for turn in (torch.cos, torch.sin))
        (q, _), (k, _) = (at_the_end_of_a_page(torch.randn(batch, count * size).to(dtype)) for count in (heads, groups))
        meant = [rotated(x.view(batch, -1, size), cos, sin).flatten(1) for x in (q, k)]
        runs.rotary(q, k, cos, sin, size)
        assert torch.equal(q, meant[0])
        assert torch.equal(k, meant[1])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("block", ROTATED)
def test_mixed_inputs(runs: Library, block: int, dtype: torch.dtype) -> None:
    """Up to the rounding of sums in another order, of magnitudes that add up to `total`, and of the result."""
    for rows in (1, 3):
        x, _ = at_the_end_of_a_page((torch.randn(rows, 3 * block) * 8).to(dtype))
        found, meant = runs.mix(x, block), mixed_in_blocks(x, block)
        total = x.float().abs().view(rows, 3, block).sum(-1, keepdim=True) / block**0.5
        allowed = 2 * ROUNDING[dtype] * meant.float().abs().view(rows, 3, block) + 16 * 2**-24 * total
        assert bool(((found.float() - meant.float()).view(rows, 3, block).abs() <= allowed).all())
    x[0, 1] = torch.nan
    assert runs.mix(x, block).isnan()[0].nonzero()[:, 0].tolist() == [*range(block)]


def test_many_numbers_are_mixed_by_torch_and_few_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = torch.randn(2, 128), torch.randn(600, 128)
    calls: list[int] = []
    real = Library.mix
    monkeypatch.setattr(Library, "mix", lambda self, x, n: calls.append(len(x)) or real(self, x, n))
    torch.testing.assert_close(mixed(few, 32), mixed_in_blocks(few, 32))
    assert torch.equal(mixed(many, 32), mixed_in_blocks(many, 32))
    assert torch.equal(mixed(few[:, ::2], 32), mixed_in_blocks(few[:, ::2], 32))
    assert mixed(few, 0) is few
    asked = few.clone().requires_grad_()
    mixed(asked, 32).sum().backward()
    assert asked.grad is not None
    assert calls == [2]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("count", [1536, 37, 3])
def test_gated_products(runs: Library, count: int, dtype: torch.dtype) -> None:
    (gate, _), (up, _) = (at_the_end_of_a_page((torch.randn(2, count) * 8).to(dtype)) for _ in range(2))
    gate[0, 0], gate[1, 0], gate[0, 1] = 200, -200, 0
    found, meant = runs.gate(gate, up), silu(gate) * up
    close(found, meant, 4)
    gate[0, 2] = torch.nan
    assert runs.gate(gate, up).isnan().nonzero().tolist() == [[0, 2]]
