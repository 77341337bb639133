"""K-quants: what they mean, the search for scales of two levels against plain loops, and GPTQ among them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress.numerics import gguf_superblocks, kquants
from compress.numerics.gptq import solve
from compress.numerics.gptq_task import Settings
from compress.numerics.hessian import factor
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.spec.gguf_types import TYPES
from compress.spec.scheme import Scheme

K = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def meant(q: QTensor) -> torch.Tensor:
    """Every value by itself, in Python's numbers; a product of three is rounded once, as in fp32 both others are exact."""
    scheme, (rows, columns) = q.scheme, q.codes.shape
    assert scheme.group is not None
    assert q.super_scale is not None
    out = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            sub, block, code = j // scheme.group, j // 256, int(q.codes[i, j])
            step = float(q.super_scale[i, block]) * int(q.scale[i, sub])
            if q.minimum is None or q.super_minimum is None:
                out[i, j] = step * (code - scheme.middle)
            else:
                low = float(q.super_minimum[i, block]) * int(q.minimum[i, sub])
                out[i, j] = float(torch.tensor(step * code, dtype=torch.float64).float()) - low
    return out.float()


@pytest.mark.parametrize("text", K)
def test_what_codes_mean(text: str) -> None:
    q = nearest(torch.randn(2, 512), Scheme.parse(text), torch.bfloat16).q
    assert torch.equal(q.dequantize(), meant(q))
    plain = q.plain()
    assert plain.super_scale is None
    assert torch.equal(plain.dequantize(), q.dequantize())


def by_hand(x: torch.Tensor, scheme: Scheme) -> tuple[list[int], list[int]]:
    """u and v of a super-block [subs, group]: the free scales, then for each sub-block the best of their neighbours."""
    low, high = kquants._ENDS[scheme.bits]
    s, m = kquants._free(x[None, None], None, scheme, "mse")
    s, m = s[0, 0], m[0, 0]
    d = (max(s.tolist(), key=abs) / (high if scheme.minimum else low)) or 2.0**-24
    d = float(torch.tensor(d).half())
    e = float((-m).max().div(high).half()) or 2.0**-24
    whole = [part[0, 0] for part in kquants._free(x[None, None], None, scheme, "none")]
    starts = [(s, m), whole] if scheme.minimum else [(s, m)]
    us, vs = [], []
    for i, row in enumerate(x):
        tried = []
        for steps, lows in starts:
            u0, v0 = float(steps[i] / d), float(-lows[i] / e)
            offsets = (0, -1, 1, -2, 2) if scheme.minimum else (0, -1, 1, -2, 2, -3, 3, -4, 4)
            first, base = min(max(round(u0), low), high) or 1, min(max(round(v0), 0), high)
            us_near = [min(max(first + du, low), high) or 1 for du in offsets]
            vs_near = [min(max(base + dv, 0), high) for dv in offsets] if scheme.minimum else [0]
            tried += [(u, v) for u in us_near for v in vs_near]
        found = []
        for u, v in tried:
            step, shift = torch.tensor(d * u), torch.tensor(-e * v)
            if scheme.minimum:
                c = ((row - shift) / step).round().clamp(0, scheme.levels - 1)
                found.append(float((c * step + shift - row).square().sum()))
            else:
                c = (row / step).round().clamp(-scheme.middle, scheme.middle - 1)
                found.append(float((c * step - row).square().sum()))
        best = tried[found.index(min(found))]
        us.append(best[0])
        vs.append(best[1])
    return us, vs


@pytest.mark.parametrize("text", K)
def test_the_search_against_plain_loops(text: str) -> None:
    scheme = Scheme.parse(text)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 0, 3)[:, None]
    found = kquants.fit(kquants.blocked(x, scheme), None, scheme)
    for row, block in enumerate(kquants.blocked(x, scheme)[:, 0]):
        u, v = by_hand(block, scheme)
        assert found.scale[row, 0].tolist() == u
        if found.minimum is not None:
            assert found.minimum[row, 0].tolist() == v


@pytest.mark.parametrize(("text", "plain"), [("q2_k", "w2a16g16-min"), ("q4_k", "w4a16g32-min"), ("q6_k", "w6a16g16")])
def test_two_levels_cost_little_beside_free_scales(text: str, plain: str) -> None:
    w = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    ours = nearest(w, Scheme.parse(text), torch.float32, "mse").error
    assert ours < 1.02 * nearest(w, Scheme.parse(plain), torch.float32, "mse").error
    assert ours <= nearest(w, Scheme.parse(text), torch.float32, "none").error


@pytest.mark.parametrize("text", K)
def test_columns_of_more_weight_are_met_better(text: str) -> None:
    scheme, generator = Scheme.parse(text), torch.Generator().manual_seed(2)
    x, h = torch.randn(8, 512, generator=generator), torch.logspace(-2, 2, 512)[torch.randperm(512, generator=generator)]

    def lost(weights: torch.Tensor | None) -> float:
        blocks = kquants.blocked(x, scheme)
        levels = kquants.fit(blocks, None if weights is None else kquants.blocked(weights, scheme), scheme)
        codes = kquants.codes(blocks, levels, scheme).flatten(1).to(torch.uint8)
        return float(((levels.of(scheme, codes).dequantize() - x).square() * h).sum())

    assert lost(h) < 0.95 * lost(None)


@pytest.mark.parametrize("text", K)
def test_zeros_constants_and_extremes(text: str) -> None:
    scheme = Scheme.parse(text)
    one = torch.zeros(1, 512)
    one[0, 300] = 1.0
    for w in (torch.zeros(1, 512), torch.full((1, 512), 0.25), torch.full((1, 512), -3.0), torch.randn(2, 512) * 1e-9, one):
        q = nearest(w, scheme, torch.bfloat16, "mse").q
        assert bool(q.dequantize().isfinite().all())
        assert bool((q.scale != 0).all())
        assert float((q.dequantize() - w).abs().max()) <= max(0.07 * float(w.abs().max()), 2.0**-18)
    assert not nearest(torch.zeros(1, 512), scheme, torch.bfloat16).q.nonzero().any()
    assert bool(nearest(torch.full((1, 512), 1e30), scheme, torch.float32).q.steps().isfinite().all())


@pytest.mark.parametrize("text", K)
def test_any_bytes_of_blocks_come_back_and_mean_what_the_package_gguf_says(text: str) -> None:
    quants, constants = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf.constants")
    scheme, kind = Scheme.parse(text), text.upper()
    blocks = torch.randint(0, 256, (5, 3, TYPES[kind].nbytes), dtype=torch.uint8)
    q = gguf_superblocks.decode(scheme, blocks.flatten(1))
    assert q.super_scale is not None
    assert torch.equal(gguf_superblocks.encode(q), blocks.flatten(1))
    with np.errstate(invalid="ignore"):
        theirs = torch.from_numpy(quants.dequantize(blocks.flatten(1).numpy(), constants.GGMLQuantizationType[kind]))
    assert torch.equal(q.dequantize().nan_to_num(1.5, 2.5, 3.5), theirs.nan_to_num(1.5, 2.5, 3.5))


def correlated(n: int = 512, tokens: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [24, n], and the mean outer product of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, n, generator=generator) @ (torch.randn(n, n, generator=generator) / n**0.5 + 0.3 * torch.eye(n))
    x = x * torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)]
    return torch.randn(24, n, generator=generator) * 0.02, x.T @ x / tokens


@pytest.mark.parametrize("order", ["activation", "none"])
@pytest.mark.parametrize("text", K)
def test_gptq_errs_less_and_knows_by_how_much(text: str, order: str) -> None:
    scheme, (w, h) = Scheme.parse(text), correlated()
    found = solve(w, factor(h, 0.01, order), h, scheme, torch.bfloat16)
    assert found.levels is not None
    q = found.levels.of(scheme, found.codes)
    assert torch.equal(q.steps(), found.scale)
    d = (w - q.dequantize()).double()
    assert math.isclose(float(((d @ h.double()) * d).sum()), found.loss, rel_tol=1e-3)
    assert math.isclose(float(d.square().sum()), float(found.errors.sum()), rel_tol=1e-4)
    r = (w - nearest(w, scheme, torch.bfloat16, "mse").q.dequantize()).double()
    assert found.loss < 0.6 * float(((r @ h.double()) * r).sum())
    plain = solve(w, factor(h, 0.01, order), h, scheme, torch.bfloat16, Settings(sweeps=0))
    assert found.loss < plain.loss


def test_gptq_keeps_masks_and_columns_without_inputs() -> None:
    w, h = correlated()
    h[:, 7] = h[7] = 0
    mask = torch.rand(w.shape) > 0.5
    scheme = Scheme.parse("q3_k")
    found = solve(w * mask, factor(h, 0.01, "activation"), h, scheme, torch.bfloat16, mask=mask)
    assert found.levels is not None
    assert not found.levels.of(scheme, found.codes).dequantize()[~mask].any()
    dead = solve(w, factor(h, 0.01, "activation"), h, Scheme.parse("q4_k"), torch.bfloat16)
    assert bool(dead.losses.isfinite().all())
