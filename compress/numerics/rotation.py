"""Rotation: orthogonal matrices of Hadamard's kind, or at random, by a seed.

Legend: n channels; R [n, n] with R R^T = 1; a row x [n] becomes x R. H [n, n] has entries of +-1 and H H^T = n; H_a x H_b is one
of order a b. s [n] are random signs.

    hadamard     R = diag(s) H / sqrt(n), of known H: Sylvester's (2^k), Paley's (1 + q for a prime q = 3 mod 4, 2 + 2 q for
                 one = 1 mod 4), and products; every hidden size of today's models has one (576 = 12 x 12 x 4)
    block        diag(s) (1 x H), with H of the largest power of two that divides n
    orthogonal   uniformly distributed: Q of the QR decomposition of a normal matrix, with positive diagonal of R

Every entry of x R is a mean of all (of a block's) entries of x with signs, so that an outlier is spread over all of them: QuIP#
(Tseng et al., 2402.04396), QuaRot (Ashkboos et al., 2404.00456). R is applied factor by factor, in float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["hadamard", "block", "orthogonal"]
_MOST = 64
"""Largest of Sylvester's matrices that is multiplied by as a whole."""


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) (1 x F1 x F2 x ..), of size n; the factors F are orthogonal, in float64."""

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @property
    def n(self) -> int:
        return len(self.signs)

    def rotate(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """x R along an axis, whose length n divides: each n entries that follow each other by themselves; x is in float64."""
        x = x.movedim(axis, -1)
        y = (x.reshape(*x.shape[:-1], -1, self.n) * self.signs).reshape(-1, *(len(factor) for factor in self.factors))
        for place, factor in enumerate(self.factors, start=1):
            y = (y.movedim(place, -1) @ factor).movedim(-1, place)
        return y.reshape(x.shape).movedim(-1, axis)


def rotation(n: int, kind: Kind, seed: str) -> Rotation:
    """A rotation of n channels; `hadamard` where no matrix is known is `orthogonal`. The same for the same `seed`."""
    import torch

    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    orders = factors(n, kind)
    if orders is None:
        q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        return Rotation(torch.ones(n, dtype=torch.float64), (q * r.diagonal().sign(),))
    signs = torch.randint(2, (n,), generator=generator).double() * 2 - 1
    return Rotation(signs, tuple(hadamard(order) / order**0.5 for order in orders))


def said(n: int, kind: Kind) -> str:
    """The kind of rotation that n channels get, in words."""
    orders = factors(n, kind)
    if orders is None:
        return f"random orthogonal {n}" + (", for no Hadamard matrix of that order is known here" if kind == "hadamard" else "")
    size, blocks = prod(orders), n // prod(orders)
    parts = " x ".join(map(str, orders))
    return f"Hadamard {size}{f' = {parts}' if len(orders) > 1 else ''}{f' in {blocks} blocks' if blocks > 1 else ''}"


def factors(n: int, kind: Kind) -> tuple[int, ...] | None:
    """The orders of the factors of a rotation of n channels; None if it is no Hadamard matrix."""
    return None if kind == "orthogonal" else _sylvester(n & -n) if kind == "block" else orders(n)


@lru_cache
def orders(n: int) -> tuple[int, ...] | None:
    """Orders of known Hadamard matrices whose product is n, those with the least sum; None if there are none."""
    if n & (n - 1) == 0:
        return _sylvester(n)
    found: list[tuple[int, ...]] = []
    for order in (d for d in range(12, n + 1, 4) if n % d == 0 and d & (d - 1) and _prime_of(d)):
        if (rest := orders(n // order)) is not None:
            found.append((order, *(one for one in rest if one > 1)))
    return min(found, key=sum) if found else None


def _sylvester(n: int) -> tuple[int, ...]:
    """Factors of a power of two."""
    return (n,) if n <= _MOST else (_MOST, *(one for one in _sylvester(n // _MOST) if one > 1))


def _prime_of(n: int) -> int:
    """The prime of which Paley's construction makes order n; 0 if there is none."""
    if n % 4 == 0 and _is_prime(n - 1):
        return n - 1
    q = n // 2 - 1
    return q if q % 4 == 1 and _is_prime(q) else 0


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))


def hadamard(n: int) -> torch.Tensor:
    """H [n, n] of +-1 in float64, for n a power of two or of Paley's kind."""
    import torch

    if n & (n - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < n:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h
    q = _prime_of(n)
    assert q, n
    squares = {x * x % q for x in range(1, q)}
    chi = torch.tensor([0.0, *(1.0 if x in squares else -1.0 for x in range(1, q))], dtype=torch.float64)
    numbers = torch.arange(q)
    # Paley: the core is antisymmetric for q = 3 mod 4, symmetric for q = 1 mod 4, and so is C with its border.
    c = torch.ones(q + 1, q + 1, dtype=torch.float64)
    c[0, 0], c[1:, 1:] = 0, chi[(numbers[None] - numbers[:, None]) % q]
    if n == q + 1:
        c[1:, 0] = -1
        return c + torch.eye(n, dtype=torch.float64)
    ones, turned = (torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(c, ones) + torch.kron(torch.eye(q + 1, dtype=torch.float64), turned)
