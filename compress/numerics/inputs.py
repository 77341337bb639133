"""Activations rounded as a model runs, with dynamic scales per token or block.

Legend: x [..., width]; p the largest magnitude over the width, or over each 128 of it for `fp8-block`, 32 for mxfp4, 16 for
nvfp4; s the scale, b bits, l = min(x, 0) and h = max(x, 0) over the width.
    int8, int4    s = p / (2^b - 1) * 2, whole numbers from -2^(b-1) to 2^(b-1) - 1
    -asym         s = (h - l) / (2^b - 1), and a zero point z = round(-2^(b-1) - l / s), so that x becomes s (q - z)
    fp8           s = p / 448, E4M3
    mxfp4         s = 2^(floor(log2 p) - 2) after p is rounded to one bit of mantissa (the rule `even` of scales.py), E2M1
    nvfp4         s = e4m3(p D / 6) / D, E2M1; D is measured on calibration tokens and stored as `input_scale`
Everything is computed in x's own dtype (for nvfp4 the scale in fp32, once p / 6 is rounded to x's dtype), so the values are those
of compressed-tensors. Keys and values in a cache have static scales, found beforehand in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compress.numerics.floats import decode, encode
from compress.numerics.input_rotation import rotated
from compress.numerics.qtensor import QTensor
from compress.numerics.scales import divisor, fit, steps
from compress.spec.scheme import BLOCK, Scheme

_MX, _NV, _INT8 = map(Scheme.parse, ("mxfp4-even", "nvfp4", "w8a8"))
_NO_SCALE = 0.125
"""What a scale in E4M3 that comes out as zero becomes, for compressed-tensors: its machine epsilon."""


class InputRounding(NamedTuple):
    """How the inputs of a weight are rounded."""

    scheme: Scheme
    divisor: torch.Tensor | None = None
    """D of nvfp4, fp32 []; None for 1."""
    columns: torch.Tensor | None = None
    """Inputs that are not rounded with the others, int32 [k] (numerics/columns.py)."""
    int8: bool = False
    """Whether these are rounded by themselves, to int8 per token."""

    @classmethod
    def of(cls, q: QTensor) -> InputRounding:
        return cls(q.scheme, q.input_scale, *(() if q.kept is None else (q.kept.columns, q.kept.scale is not None)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs as the weight that codes mean reads them; what is rounded are rotated ones, where the scheme rotates them."""
        return rotated(self.of_codes(x), self.scheme.hadamard)

    def of_codes(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs as codes are multiplied by them: rotated, and rounded."""
        x = rotated(x, self.scheme.hadamard)
        if not self.scheme.inputs:
            return x
        if self.columns is None:
            return rounded_inputs(x, self.scheme, self.divisor)
        kept = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        kept[self.columns.to(x.device).long()] = True
        # Zeros widen no range, and stay zeros.
        others = rounded_inputs(x.masked_fill(kept, 0), self.scheme, self.divisor)
        return torch.where(kept, rounded_inputs(x.masked_fill(~kept, 0), _INT8) if self.int8 else x, others)


def rounded_inputs(x: torch.Tensor, scheme: Scheme, d: torch.Tensor | None = None) -> torch.Tensor:
    """`x` rounded as this scheme rounds activations, in the same shape and dtype; `d` is D of nvfp4, fp32 []."""
    kind, _, asymmetric = scheme.inputs.partition("-")
    if kind in ("mxfp4", "nvfp4"):
        return _blocks(x, kind, d)
    if kind.startswith("int"):
        q, s, z = in_integers(x, int(kind[3:]), bool(asymmetric))
        return (q if z is None else q - z) * s
    if scheme.scales == "block":
        return _dequantized(in_fp8(x.unflatten(-1, (-1, BLOCK))), x.dtype).flatten(-2)
    return _dequantized(in_fp8(x), x.dtype)


def in_integers(
    x: torch.Tensor, bits: int, asymmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """x [..., width] as q, whole numbers, and s [..., 1], with zero points z [..., 1] if asymmetric; all in x's dtype."""
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if not asymmetric:
        s = _scale(x, (most - least) / 2)
        return (x / s).clamp(least, most).round(), s, None
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = (high - low) / (most - least)
    z = torch.where(s == 0, 0, least - low / s).clamp(least, most).round()
    s = _not_zero(s)
    return (x / s).add_(z).clamp_(least, most).round_(), s, z


def in_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., width] as q s, with q in E4M3 and s [..., 1] in x's dtype. In bf16, rounding q s again gives the same q and s."""
    s = _scale(x, 448.0)
    return _e4m3(x / s), s


def in_cache(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values [samples, heads, tokens, width] as E4M3 holds them with a scale [1], or [heads, 1, 1] for each head."""
    s = scale.to(x.device, x.dtype)
    return _e4m3(x / s).to(x.dtype) * s


def cache_scale(peak: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale in `dtype` for magnitudes up to `peak`; 1 where there are none, so that nothing is divided by zero."""
    s = (peak.double() / 448).to(dtype)
    return torch.where(s == 0, 1.0, s)


def input_divisor(peak: float, device: torch.device | None = None) -> torch.Tensor:
    """D of nvfp4 activations whose largest magnitude is `peak`, fp32 []."""
    found = divisor(peak, _NV, device)
    assert found is not None
    return found


def _blocks(x: torch.Tensor, kind: str, d: torch.Tensor | None) -> torch.Tensor:
    """`x` in E2M1, with a scale for each block of its width."""
    scheme = _MX if kind == "mxfp4" else _NV
    assert scheme.group is not None
    blocks = x.unflatten(-1, (-1, scheme.group))
    if kind == "mxfp4":
        rows = x.reshape(-1, x.shape[-1])
        s = steps(fit(rows, scheme, x.dtype, "none", 0.0)).to(x.dtype).view(*blocks.shape[:-1], 1)
        s = torch.where(s == 0, 1, s)  # fp16 has no such small powers of two
    else:
        whole = torch.ones((), device=x.device) if d is None else d.to(x.device)
        s = _e4m3(blocks.abs().amax(-1, keepdim=True).div(6).float() * whole).float()
        s = torch.where(s == 0, _NO_SCALE, s) / whole
    codes = encode((blocks / s).float(), scheme)
    return (decode(codes, scheme).to(s.dtype) * s).flatten(-2).to(x.dtype)


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def _dequantized(coded: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    q, s = coded
    return q.to(dtype) * s


def _scale(x: torch.Tensor, top: float) -> torch.Tensor:
    return _not_zero(x.abs().amax(-1, keepdim=True) / top)


def _not_zero(s: torch.Tensor) -> torch.Tensor:
    return torch.where(s == 0, torch.finfo(s.dtype).eps, s)
