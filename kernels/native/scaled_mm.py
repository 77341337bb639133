"""scaled_mm backend: torch's own product of FP8 by FP8, with scales per row.

Legend: M tokens, N rows, K columns; x = q s with q in E4M3 [M, K] and s [M]; w = v t with v in E4M3 [N, K] and t [N].

The codes are kept in plain rows, as torch multiplies them, with N and K padded to multiples of 16. Activations are rounded
already, by numerics/inputs.py in their own dtype, in which q s is rounded once more; rounding them again gives the same q and
s. So the product has the same factors as in a reader of the checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch.nn.functional import pad

from compress.errors import Refusal
from compress.kernels.cuda import device
from compress.kernels.dispatch import Work
from compress.kernels.native.fused import Fused
from compress.kernels.native.packed import Packed
from compress.numerics.inputs import in_fp8
from compress.numerics.qtensor import with_beside

_MULTIPLE = 16
_E4M3 = torch.float8_e4m3fn


class ScaledMM(Fused):
    """E4M3 weights with a scale per row or matrix, and activations rounded to FP8 per token."""

    name = "scaled_mm"

    def refuse(self, work: Work) -> None:
        scheme = work.state.scheme
        if scheme is None or scheme.grid != "e4m3" or scheme.scales not in ("row", "tensor") or scheme.inputs != "fp8":
            raise Refusal(f"{work.state} is not FP8 E4M3 by rows with activations in FP8", "use another backend")
        capability = device.usable(work.device)
        if capability < (8, 9):
            raise Refusal(f"a GPU of compute capability {capability} does not multiply FP8", "use another backend")
        if work.dtype != torch.bfloat16:
            raise Refusal("with a scale per token torch's product comes out in bfloat16", "load the model in bfloat16")
        if work.turned:
            raise Refusal("a Conv1D adds over its rows", "leave the backend to be chosen")
        if work.looked_up:
            raise Refusal("its rows are looked up as well", "use another backend")
        if work.state.outliers is not None:
            raise Refusal("it has outliers", "use another backend")
        if reason := _fails():
            raise Refusal(f"torch does not multiply FP8 with scales of rows here: {reason}", "use another backend")

    def prepare(self, packed: Packed) -> dict[str, torch.Tensor]:
        parts = {name: part for name, part in packed.parts.items() if name not in ("tiles", "scale")}
        rows, columns = (-(-side // _MULTIPLE) * _MULTIPLE for side in (packed.rows, packed.columns))
        codes = packed.parts["tiles"].new_zeros(rows, columns, dtype=torch.uint8)
        scale = packed.parts["scale"].new_ones(rows)
        for part in self.chunks(packed):
            q = packed.take(part)
            codes[part, : packed.columns], scale[part] = q.codes, q.scale[:, 0]
        return {"fp8": codes.view(_E4M3), "row_scale": scale, **parts}

    def rows(self, packed: Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        codes, scale = packed.parts["fp8"][rows, : packed.columns].view(torch.uint8), packed.parts["row_scale"][rows, None]
        state = replace(packed.state, scheme=replace(packed.scheme, scales="row"))
        q = with_beside(state, codes, scale, None, packed.parts)
        if q.lowrank is not None:
            q = replace(q, lowrank=replace(q.lowrank, left=q.lowrank.left[rows]))
        return q.dequantize().to(dtype)

    def product(self, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        codes, scale = in_fp8(x)
        weight, more = packed.parts["fp8"], -len(x) % _MULTIPLE
        codes = pad(codes.view(torch.uint8), (0, weight.shape[1] - x.shape[1], 0, more)).contiguous().view(_E4M3)
        out = torch._scaled_mm(
            codes, weight.T, pad(scale.float(), (0, 0, 0, more)), packed.parts["row_scale"][None],
            None if bias is None else pad(bias.to(x.dtype), (0, len(weight) - packed.rows)), out_dtype=x.dtype,
        )  # fmt: skip
        return out[: len(x), : packed.rows].contiguous()


@lru_cache(maxsize=1)
def _fails() -> str:
    """torch's error for such a product, on GPUs that should support it; empty if it works."""
    side = torch.zeros(_MULTIPLE, _MULTIPLE, device="cuda").to(_E4M3)
    ones = torch.ones(_MULTIPLE, 1, device="cuda")
    try:
        torch._scaled_mm(side, side.T, ones, ones.T, out_dtype=torch.bfloat16)
    except (AttributeError, RuntimeError, TypeError) as error:
        return str(error).partition("\n")[0]
    return ""
