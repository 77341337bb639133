"""Rotations: Hadamard matrices of every order that models have, orthogonal, by seed; what they do to outliers."""

from __future__ import annotations

from math import prod

import pytest
import torch

from compress.numerics.rotation import Kind, hadamard, orders, rotation, said

SIZES = (
    64, 72, 80, 96, 112, 128, 192, 256, 576, 640, 768, 896, 960, 1024, 1152, 1280, 1536, 1600, 1792, 2048, 2304, 2560, 2688,
    2880, 3072, 3200, 3584, 3840, 4096, 4544, 4608, 5120, 5376, 6144, 6656, 7168, 8192, 12288, 16384, 18432,
)  # fmt: skip
"""Head and hidden sizes of models."""


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 64, 68, 72, 76, 84, 104, 108, 140, 148, 180])
def test_hadamard_matrices_are_such(n: int) -> None:
    h = hadamard(n)
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", SIZES)
def test_every_size_of_models_has_one(n: int) -> None:
    found = orders(n)
    assert found is not None
    assert prod(found) == n


@pytest.mark.parametrize("n", [1, 2, 3, 12, 46, 64, 92, 128, 144, 240, 576])
@pytest.mark.parametrize("kind", ["hadamard", "block", "orthogonal"])
def test_rotations_are_orthogonal_and_follow_their_seed(n: int, kind: Kind) -> None:
    one = torch.eye(n, dtype=torch.float64)
    r = rotation(n, kind, "a").rotate(one, 1)
    torch.testing.assert_close(r @ r.T, one, rtol=0, atol=1e-12)
    assert torch.equal(r, rotation(n, kind, "a").rotate(one, 1))
    if n > 3:
        assert not torch.equal(r, rotation(n, kind, "b").rotate(one, 1))


def test_an_axis_is_multiplied_piece_by_piece() -> None:
    """The oracle: the whole matrix, piece by piece of the axis."""
    turn = rotation(12, "hadamard", "a")
    r, x = turn.rotate(torch.eye(12, dtype=torch.float64), 1), torch.randn(3, 24, 2, dtype=torch.float64)
    wanted = torch.cat([torch.einsum("anb,nm->amb", part, r) for part in x.split(12, 1)], 1)
    torch.testing.assert_close(turn.rotate(x, 1), wanted)


def test_what_is_taken_is_said() -> None:
    assert said(576, "hadamard") == "Hadamard 576 = 12 x 12 x 4"
    assert said(576, "block") == "Hadamard 64 in 9 blocks"
    assert said(128, "hadamard") == "Hadamard 128 = 64 x 2"
    assert said(16, "hadamard") == "Hadamard 16"
    assert said(92, "hadamard") == "random orthogonal 92, for no Hadamard matrix of that order is known here"
    assert said(64, "orthogonal") == "random orthogonal 64"


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_an_outlier_is_spread_over_all_channels(kind: Kind) -> None:
    """QuaRot's reason: with one channel 50 times as large as the others, the largest entry falls to that of a normal vector."""
    x = torch.randn(200, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 7] *= 50
    y = rotation(576, kind, "a").rotate(x, 1)

    def peak(z: torch.Tensor) -> float:
        return float((z.abs().amax(1) / z.square().mean(1).sqrt()).mean())

    assert peak(x) > 12
    assert peak(y) < 4.5
